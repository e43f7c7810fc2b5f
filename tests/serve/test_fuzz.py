"""Fuzzes every route from the OpenAPI schema: no internal errors and no hangs."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck

CHECKED = (
    schemathesis.checks.not_a_server_error,
    *(
        check
        for check in schemathesis.checks.CHECKS.get_all()
        if check.__name__
        in ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    ),
)
SECONDS = 20  # of one request at most; OpenAI's form waits until the image is there


def fuzz(running, cases):
    """Returns the number of requests."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {(one.method.upper(), one.path) for one in operations} == {
        ("GET", "/v1/model"),
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs/{job_id}"),
        ("DELETE", "/v1/jobs/{job_id}"),
        ("GET", "/v1/jobs/{job_id}/events"),
        ("GET", "/v1/images/{name}"),
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model_id}"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    }
    # Routes without parameters get few requests. Most go where there is something to vary.
    weights = {one.label: 1 if one.path.count("{") == 0 and one.method == "get" else 8 for one in operations}
    made = 0
    for operation in operations:
        many = max(1, cases * weights[operation.label] // sum(weights.values()))
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if weights[operation.label] > 1:
            negative = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            strategy = strategy | negative

        @hypothesis.given(strategy)
        @hypothesis.settings(
            max_examples=many,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        def run(case):
            nonlocal made
            made += 1
            response = case.call(timeout=SECONDS)
            case.validate_response(response, checks=CHECKED)

        run()
    return made


@pytest.mark.filterwarnings("ignore")  # of schemathesis's own
def test_no_request_breaks_the_service(serve):
    running = serve(max_jobs_per_client=1000)
    assert fuzz(running, 150) > 100
    assert running.wait(running.draw())["state"] == "done"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_requests_break_nothing(serve):
    running = serve(max_jobs_per_client=1000)
    assert fuzz(running, 2000) > 1500
    assert running.wait(running.draw())["state"] == "done"
