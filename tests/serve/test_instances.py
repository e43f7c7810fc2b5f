"""Two instances behind a load balancer, with one results folder."""

import http.client
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest


@pytest.fixture
def balanced():
    """Starts a round-robin proxy, which is the default of nginx."""
    servers = []

    def start(*addresses):
        turns = itertools.cycle(addresses)

        class Proxy(BaseHTTPRequestHandler):
            def pass_on(self):
                host = next(turns).removeprefix("http://")
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                connection.close()

            do_GET = do_POST = do_DELETE = pass_on

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_all_instances_serve_images_but_only_one_knows_a_job(serve, balanced):
    """An image must not depend on the instance. A job on another instance must be reported with the
    reason."""
    one, other = serve(), serve()
    url = balanced(one.url, other.url)
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        job = client.post("/v1/jobs", json={"prompts": ["a cat"]}).json()
        answers = [client.get(f"/v1/jobs/{job['id']}") for _ in range(4)]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 404, 404]
        for answer in answers:
            if answer.status_code == 404:
                error = answer.json()["error"]
                assert error["code"] == "wrong_instance"
                assert one.service.instance in error["message"]
        for path in (f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/events"):
            assert other.http.get(path).json()["error"]["code"] == "wrong_instance"
        assert other.http.delete(f"/v1/jobs/{job['id']}").status_code == 404
        (image,) = one.wait(job)["images"]
        assert one.service.instance in image["url"]
        contents = {client.get(image["url"]).content for _ in range(4)}
        assert len(contents) == 1
        assert contents.pop().startswith(b"\x89PNG")
        # OpenAI's route needs no affinity, and its URLs point to the balancer.
        for _ in range(4):
            answer = client.post("/v1/images/generations", json={"prompt": "a cat"}).json()
            assert answer["data"][0]["url"].startswith(url)
            assert client.get(answer["data"][0]["url"]).status_code == 200


def test_clients_behind_a_load_balancer_are_distinguished(serve):
    """Bugs: all clients count as one and share a limit, or anybody's forwarded headers are trusted."""
    for proxies, status in ((("127.0.0.1",), 202), ((), 429)):
        running = serve(proxies=proxies, max_jobs_per_client=1)
        body = json.dumps({"prompts": ["slowly"], "prior_steps": 50})
        headers = {"content-type": "application/json"}
        first, second = (
            running.http.post("/v1/jobs", content=body, headers={**headers, "x-forwarded-for": f"10.0.0.{k}"})
            for k in (1, 2)
        )
        assert (first.status_code, second.status_code) == (202, status)
        running.http.delete(f"/v1/jobs/{first.json()['id']}")
