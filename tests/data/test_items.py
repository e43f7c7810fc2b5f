"""Helpers that readers share: captions in a cell."""

from wuerstchen.data.items import MAX_TEXT, captions_in, known_fields, text_in


def test_captions_are_all_that_say_something_once_each():
    assert captions_in(" a  cat\n") == ("a cat",)
    assert captions_in(["a cat", "", None, 3, "a dog", " a cat ", b"a fox"]) == ("a cat", "a dog", "a fox")
    assert captions_in(None) == captions_in(b"\xff") == captions_in("\ud83d") == ()
    assert captions_in("x" * MAX_TEXT) == ("x" * MAX_TEXT,)
    assert captions_in("x" * (MAX_TEXT + 1)) == ()


def test_the_first_usual_name_that_says_something_is_the_caption():
    assert text_in({"text": None, "caption": "a cat"}) == "a cat"
    assert text_in({"title": "a cat"}) is None


def test_fields_are_those_that_filters_read():
    fields = {"punsafe": 0.0, "original_width": 512, "HEIGHT": None, "url": "x"}
    assert known_fields(fields) == {"punsafe": 0.0, "original_width": 512}
