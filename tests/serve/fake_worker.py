"""A stand-in for the worker process, without a model. Prompts control it."""

import os
import signal
import time

from wuerstchen.serve.heartbeat import HeartbeatConnection

DEFAULTS = {
    "guidance": 2.0,
    "guidance_interval": (0.0, 1.0),
    "prior_steps": 6,
    "prior_sampler": "ddpm",
    "decoder_steps": 4,
}
ABOUT = {
    "device": "fake",
    "side": 64,
    "multiple": 8,
    "min": 64,
    "max_side": 256,
    "defaults": DEFAULTS,
    "full": DEFAULTS,
    "students": {},
    "samplers": ["ddpm", "dpm", "ddim"],
    "decoder_samplers": [],
    "can": {"generate": True, "reconstruct": True, "variation": True, "preview": True},
    "examples": ["a cat"],
    "image_note": None,
}
PREVIEW = "data:image/webp;base64,UklGRg=="


def main(settings, pipe):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = HeartbeatConnection(pipe, 0.05)
    if settings.model == "loads for ever":
        time.sleep(1000)
    if settings.model == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if settings.model == "nowhere":
        connection.send(("load_error", "model 'nowhere' does not exist; give a folder"))
        return
    if settings.model == "dies at once":
        os._exit(3)
    connection.send(("ready", ABOUT))
    try:
        while True:
            message = connection.recv()
            if message[0] == "generate":
                generate(message[1], connection)
    except (EOFError, OSError):
        return


def generate(batch, connection):
    shape, unwanted = batch.shape, set()
    words = {word for prompt in batch.prompts for word in prompt.split()}
    if "crash" in words:
        os._exit(1)
    if "hang" in words:
        time.sleep(1000)
    if "fail" in words:
        connection.send(("failed", batch.number, "it does not fit into memory", "invalid_request_error"))
        return
    seconds = 0.2 if "slowly" in words else 0.002
    for place in range(len(batch.prompts)):
        if "long" in batch.prompts[place]:
            connection.send(("notice", batch.number, place, "words are lost"))
    stages = [("Stage B", shape.decoder_steps)]
    if shape.kind == "generate":
        stages.insert(0, ("Stage C", shape.prior_steps))
    for number, (stage, steps) in enumerate(stages):
        for step in range(1, steps + 1):
            time.sleep(seconds)
            while connection.poll():
                message = connection.recv()
                if message[0] == "unwanted" and message[1] == batch.number:
                    unwanted.update(message[2])
            if len(unwanted) == len(batch.seeds):
                connection.send(("stopped", batch.number))
                return
            connection.send(
                ("step", batch.number, stage, step, steps, (number + 0.9 * step / steps) / len(stages))
            )
            for place in batch.previews:
                connection.send(("preview", batch.number, place, 8, 8, PREVIEW))
    for place, seed in enumerate(batch.seeds):
        colour = bytes([seed % 256, len(batch.prompts), shape.prior_steps])
        pixels = batch.images[place] if batch.images else colour * (shape.width * shape.height)
        connection.send(("image", batch.number, place, shape.width, shape.height, pixels))
    connection.send(("done", batch.number, {"seconds": {"Stage B": 0.01}, "memory": 1000}))
