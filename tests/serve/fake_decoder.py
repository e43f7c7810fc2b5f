"""A stand-in for the process that decodes uploads. The text of an upload controls it."""

import os
import time


def main(memory, connection):
    connection.send(("ready",))
    try:
        while True:
            number, upload = connection.recv()
            word, _, value = upload.text.partition(" ")
            if word == "sleep":
                time.sleep(float(value))
            elif word == "crash":
                os._exit(1)
            if word == "refuse":
                connection.send(("refused", number, 400, value, False))
            else:
                notices = (value,) if word == "notice" else ()
                connection.send(("pixels", number, upload.text.encode(), notices, word == "last"))
                if word == "last":
                    return
    except (EOFError, OSError):
        return
