"""Decoding of uploads: clients take turns, time is limited, and the processes can be killed."""

import asyncio
import base64
import io
import multiprocessing
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from wuerstchen.serve import decoding
from wuerstchen.serve.decoding import Upload, UploadError
from wuerstchen.serve.uploads import Decoded, Uploads


def encoded(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def slow_image(side=2000, scans=2000):
    """A progressive JPEG with far too many scans, of 12 bytes each."""
    image = Image.new("RGB", (side, side), (200, 100, 50))
    data = base64.b64decode(encoded(image, "JPEG", progressive=True))
    last = data.rindex(b"\xff\xda")
    return base64.b64encode(data[:-2] + data[last:-2] * scans + data[-2:]).decode()


def upload(text="x", **settings):
    limits = {"max_bytes": 10**7, "max_pixels": 10**7, "seconds": 30.0}
    return Upload(text, **{"width": 8, "height": 8, **limits, **settings})


@pytest.fixture
def with_uploads(monkeypatch):
    """Runs a coroutine function with ``Uploads`` that use stand-ins for the decoders."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the processes inherit this path
    import fake_decoder

    def run(use, **settings):
        async def main():
            uploads = Uploads(**{"max_per_client": 100, "main": fake_decoder.main, **settings})
            try:
                await asyncio.wait_for(use(uploads), 60)
            finally:
                await uploads.stop()

        asyncio.run(main())

    return run


async def error_of(decoding):
    with pytest.raises(UploadError) as caught:
        await decoding
    return caught.value


def test_clients_take_turns(with_uploads):
    """One client's many jobs must not block another client's."""

    async def use(uploads):
        ended = []

        async def decode(client, text):
            await uploads.decode(client, upload(text))
            ended.append(client)

        greedy = [asyncio.create_task(decode("greedy", "sleep 0.1")) for _ in range(12)]
        while uploads._decoders[0].task is None or not uploads._decoders[0].ready:
            await asyncio.sleep(0.01)
        assert uploads._decoders[1].task is None  # reserved for other clients
        modest = [asyncio.create_task(decode(f"modest {number}", "x")) for number in range(3)]
        await asyncio.gather(*modest)
        assert ended.count("greedy") < 12
        await asyncio.gather(*greedy)
        assert len(ended) == 15

    with_uploads(use)


def test_a_slow_upload_times_out_and_the_next_is_decoded(with_uploads):
    async def use(uploads):
        error = await error_of(uploads.decode("a", upload("sleep 100", seconds=0.2)))
        assert (error.status, error.message.startswith("image takes too long")) == (400, True)
        assert await uploads.decode("a", upload("y")) == Decoded(b"y")

    with_uploads(use, decoders=1)


def test_a_disconnected_client_frees_the_decoder(with_uploads):
    """Images were decoded for hours after their clients had disconnected."""

    async def use(uploads):
        gone = [asyncio.create_task(uploads.decode("a", upload("sleep 100"))) for _ in range(3)]
        await asyncio.sleep(0)
        assert len(uploads) == 3
        for task in gone:
            task.cancel()
        assert await uploads.decode("b", upload("y")) == Decoded(b"y")
        assert len(uploads) == 0

    with_uploads(use, decoders=1)


def test_a_crash_of_a_decoder_affects_one_upload(with_uploads):
    async def use(uploads):
        error = await error_of(uploads.decode("a", upload("crash")))
        assert (error.status, "decoder crashed" in error.message) == (400, True)
        assert await uploads.decode("a", upload("x")) == Decoded(b"x")
        error = await error_of(uploads.decode("a", upload("refuse this")))
        assert (error.status, error.message) == (400, "this")

    with_uploads(use, decoders=1)


def test_a_decoder_that_uses_much_memory_is_replaced(with_uploads):
    """The memory of the largest upload was never freed."""

    async def use(uploads):
        assert await uploads.decode("a", upload("last")) == Decoded(b"last")
        first = uploads._decoders[0].process_number
        assert await uploads.decode("a", upload("x")) == Decoded(b"x")
        assert uploads._decoders[0].process_number == first + 1

    with_uploads(use, decoders=1)


def test_the_waiting_uploads_of_a_client_are_limited(with_uploads):
    async def use(uploads):
        tasks = [asyncio.create_task(uploads.decode("a", upload("sleep 0.1"))) for _ in range(3)]
        await asyncio.sleep(0)
        error = await error_of(uploads.decode("a", upload()))
        assert (error.status, error.retry_after) == (429, 2)
        assert await uploads.decode("b", upload()) == Decoded(b"x")
        await asyncio.gather(*tasks)

    with_uploads(use, max_per_client=2)


def test_uploads_are_refused_during_shutdown(with_uploads):
    async def use(uploads):
        under_way = [asyncio.create_task(uploads.decode(client, upload("sleep 100"))) for client in "aab"]
        await asyncio.sleep(0.5)
        uploads.close()
        for refused in (*under_way, uploads.decode("c", upload())):
            assert (await error_of(refused)).status == 503

    with_uploads(use)


def test_a_decoder_that_cannot_start_is_a_server_error(with_uploads, monkeypatch):
    async def use(uploads):
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.context.SpawnProcess, "start", no_room)
            assert (await error_of(uploads.decode("a", upload()))).status == 503
        assert await uploads.decode("a", upload()) == Decoded(b"x")

    def no_room(_):
        raise OSError(24, "Too many open files")

    with_uploads(use)


# With real decoders


def post(running, text, **headers):
    body = {"kind": "reconstruct", "image": text}
    return running.http.post("/v1/jobs", json=body, headers=headers, timeout=60)


def test_an_image_that_takes_hours_to_decode_is_refused(serve):
    """A JPEG of 118 kB with thousands of scans blocked all other uploads."""
    tokens = ("first-token-of-all", "second-token-of-all")
    running = serve(upload_timeout=1.0, tokens=tokens)
    slow, small = slow_image(), encoded(Image.new("RGB", (64, 64)))
    first, second = ({"Authorization": f"Bearer {token}"} for token in tokens)
    with ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(post, running, slow, **first) for _ in range(3)]
        assert post(running, small, **second).status_code == 202
        for answer in bad:
            assert answer.result().status_code == 400
            assert "too long to decode: more than 1 s" in answer.result().json()["error"]["message"]
    assert post(running, small, **first).status_code == 202


def with_profile(kind, space=b"RGB "):
    """A PNG whose colour profile has an unknown class."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[12:16] = kind
    profile[16:20] = space
    return encoded(Image.new("RGB", (64, 64), "red"), icc_profile=bytes(profile))


def test_an_ignored_colour_profile_is_reported_to_the_client_only(serve, capfd):
    """Each upload wrote a log line with eight bytes of the client's data."""
    running = serve()
    for number in range(12):
        job = post(running, with_profile(b"zz%02d" % number)).json()
        (notice,) = job["notices"]
        assert notice.startswith("The colour profile of an image cannot be used: ")
        assert notice.endswith("Its colours are read as sRGB.")
        assert f"zz{number:02}" in notice
        assert running.wait(job)["notices"] == [notice]
    assert post(running, encoded(Image.new("RGB", (64, 64)))).json()["notices"] == []
    out, errors = capfd.readouterr()
    assert "profile" not in out + errors


def test_notices_come_with_the_pixels(with_uploads):
    async def use(uploads):
        assert await uploads.decode("a", upload("notice well")) == Decoded(b"notice well", ("well",))

    with_uploads(use)


def test_decoding_stops_when_its_client_disconnects(serve):
    running = serve(upload_timeout=100.0)
    body = b'{"kind": "reconstruct", "image": "' + slow_image().encode() + b'"}'
    head = (
        "POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(running.listening.getsockname(), timeout=20) as client:
        client.sendall(head.encode() + body)
        until(lambda: running.call(lambda: len(running.service.uploads)) == 1)
    until(lambda: running.call(lambda: len(running.service.uploads)) == 0)
    assert running.http.get("/v1/jobs/x").status_code == 404


def test_slow_images_do_not_prevent_the_shutdown(serve):
    running = serve(upload_timeout=100.0)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(post, running, slow_image()) for _ in range(2)]
        until(lambda: running.call(lambda: len(running.service.uploads)) == 2)
        asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop).result(20)
        assert [answer.result().status_code for answer in answers] == [503, 503]


def until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def decoder():
    """Starts a decoder. Returns a function that sends it an upload, and the process."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(memory=2**30):
        ours, theirs = context.Pipe()
        process = context.Process(target=decoding.main, args=(memory, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((ours, process))
        assert ours.recv() == ("ready",)

        def ask(upload):
            ours.send((7, upload))
            return ours.recv()

        return ask, process

    yield start
    for ours, process in started:
        ours.close()
        process.kill()
        process.join()
        process.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc to read the memory from")
@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_memory_is_bounded(decoder, mode):
    """A 16-bit PNG of 78 kB took a gigabyte."""
    ask, _ = decoder(memory=60 * 2**20)
    text = encoded(Image.new(mode, (5000, 3000)))
    word, number, status, message, _ = ask(upload(text, max_pixels=10**8))
    assert (word, number, status) == ("refused", 7, 400)
    assert "too much memory" in message
    assert ask(upload(encoded(Image.new(mode, (50, 30)))))[0] == "pixels"


def test_memory_is_freed(decoder):
    ask, process = decoder()
    *_, last = ask(upload(encoded(Image.new("RGB", (50, 30)))))
    assert not last
    word, _, pixels, *_, last = ask(upload(encoded(Image.new("RGB", (6000, 6000)), "JPEG"), max_pixels=10**8))
    assert (word, len(pixels)) == ("pixels", 8 * 8 * 3)
    assert last == os.path.exists("/proc/self/status")
    if last:
        process.join(20)
        assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_decoder_without_a_service_exits(decoder):
    """After the service is killed, a decoder must not keep running for hours."""
    ask, process = decoder()
    with pytest.raises(EOFError):
        ask(upload(slow_image(), seconds=0.5 - decoding.ALARM_SECONDS))
    process.join(20)
    assert process.exitcode == -signal.SIGALRM


def test_webp_may_have_half_as_many_pixels():
    image = Image.new("RGB", (30, 20))
    for kind in ("PNG", "JPEG"):
        assert decoding.read_upload(upload(encoded(image, kind), max_pixels=600)).size == (30, 20)
    assert decoding.read_upload(upload(encoded(image, "WEBP"), max_pixels=1200)).size == (30, 20)
    with pytest.raises(UploadError, match=r"too many pixels: 600\. At most 300"):
        decoding.read_upload(upload(encoded(image, "WEBP"), max_pixels=600))


def test_masks_are_decoded_to_grey(decoder):
    """White repaints, and so do transparent pixels. The size as sent comes along."""
    ask, _ = decoder()
    grey = Image.new("L", (16, 8), 0)
    grey.paste(255, (0, 0, 8, 8))
    cut = Image.new("RGBA", (16, 8), "red")
    cut.putalpha(grey.point(lambda value: 255 - value))
    for mask in (grey, cut):
        word, _, pixels, _, size, _ = ask(upload(encoded(mask), name="mask", width=16, height=8))
        assert (word, size, pixels) == ("pixels", (16, 8), grey.tobytes())
    for mask, words in (
        (Image.new("L", (16, 8), 0), "mask is empty"),
        (Image.new("L", (16, 8), 255), "mask is full"),
    ):
        word, _, status, message, _ = ask(upload(encoded(mask), name="mask"))
        assert (word, status) == ("refused", 400)
        assert words in message
    side = Image.new("L", (400, 100), 0)
    side.paste(255, (0, 0, 60, 100))
    *_, message, _ = ask(upload(encoded(side), name="mask", width=64, height=64))
    assert "mask has no white pixel left: size 64x64 scales and crops its 400x100 pixels" in message
    *_, message, _ = ask(upload("§", name="mask"))
    assert message.startswith("mask is not valid base64")
