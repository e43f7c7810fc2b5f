"""Weights in prompts: the syntax of ComfyUI and A1111, and what they do to the states."""

import pytest
import torch

from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.errors import UserError
from wuerstchen.pipeline import BUNDLED
from wuerstchen.prompt_weights import WeightedPrompt, parsed, weighted


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a cat", "a cat", {}),
        ("a (red:1.3) cat", "a red cat", {"red": 1.3}),
        ("a (red) cat", "a red cat", {"red": 1.1}),
        ("a ((red)) cat", "a red cat", {"red": 1.21}),
        ("a [red] cat", "a red cat", {"red": 1 / 1.1}),
        ("(a (red:2) cat:1.5)", "a red cat", {"a ": 1.5, "red": 3.0, " cat": 1.5}),
        ("(red car:0.5), blue", "red car, blue", {"red car": 0.5}),
        (r"a cat \(animal\)", "a cat (animal)", {}),
        (r"(a cat \(animal\):1.2)", "a cat (animal)", {"a cat (animal)": 1.2}),
        ("at 10:30", "at 10:30", {}),
        ("(a: b)", "a: b", {"a: b": 1.1}),
        ("(cat:.5)", "cat", {"cat": 0.5}),
        ("(cat:+1.3)", "cat", {"cat": 1.3}),
        ("(cat:2.)", "cat", {"cat": 2.0}),
        ("(cat: 1e-1 )", "cat", {"cat": 0.1}),
        ("(:-)", ":-", {":-": 1.1}),
    ],
)
def test_weights_are_read_as_users_type_them(prompt, text, weights):
    found = parsed(prompt)
    assert found == text
    expected = [1.0] * len(text)
    for part, weight in weights.items():
        start = text.index(part)
        expected[start : start + len(part)] = [weight] * len(part)
    assert found.weights == pytest.approx(expected)


@pytest.mark.parametrize("prompt", ["a (cat", "a cat)", "[a (cat])", "(cat:1.3", "[cat:1.3)"])
def test_brackets_that_do_not_match_are_refused(prompt):
    with pytest.raises(UserError, match="bracket in the prompt does not match"):
        parsed(prompt)


@pytest.mark.parametrize("weight", ["11", "-1", "1,3", "1.3.1", "5pm", "-0.5"])
def test_weights_that_are_no_numbers_in_range_are_refused(weight):
    """Bug: they were text, with the weight 1.1."""
    with pytest.raises(UserError, match=f"from 0 to 10, got '{weight}'"):
        parsed(f"a (cat:{weight})")


def test_states_move_away_from_the_empty_prompt_s():
    """z' = e + w · (z − e) at the tokens of the weighted word, and nothing else changes."""
    encoder = read_text_encoder(BUNDLED / "text_encoder")
    prompt = parsed("a (red:1.5) cat")
    states, empty = encoder.encode([prompt, "a dog"]), encoder.encode([""])
    found = weighted(states, [prompt, "a dog"], empty, encoder, is_masked=True)
    word = encoder.tokenizer.encode(prompt).tokens.index("red")
    last = empty.states[0, int(empty.mask[0].sum()) - 1]
    torch.testing.assert_close(found.states[0, word], last + 1.5 * (states.states[0, word] - last))
    changed = (found.states != states.states).any(2)
    assert changed.nonzero().tolist() == [[0, word]]
    assert torch.equal(found.mask, states.mask)
    published = weighted(states, [prompt, "a dog"], empty, encoder, is_masked=False)
    own = empty.states[0, word]
    torch.testing.assert_close(published.states[0, word], own + 1.5 * (states.states[0, word] - own))


def test_a_weight_of_1_changes_nothing():
    encoder = read_text_encoder(BUNDLED / "text_encoder")
    prompt = WeightedPrompt("a cat", [1.0] * 5)
    states = encoder.encode([prompt])
    assert torch.equal(
        weighted(states, [prompt], encoder.encode([""]), encoder, is_masked=True).states, states.states
    )
