"""Laws of ``openapi.json``: it names the routes that are there, and they answer as it says, whatever is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from stable_diffusion.generation.strangers import LIMITS
from stable_diffusion.serve import app, page
from stable_diffusion.serve.door import MOST_PIXELS, SETTINGS
from tests.serve.served import PATIENCE, Running

DESCRIBED: dict[str, Any] = json.loads(page.FILES["/openapi.json"].content)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(DESCRIBED)
COUNTS = {
    "num_inference_steps": 2,
    "num_images_per_prompt": 2,
    "steps": 2,
    "n": 2,
    "batch_size": 2,
    "n_iter": 1,
}
"""Of these at most so many where they are numbers that can be had: it is not the drawing that is tested."""


def test_it_names_the_routes_and_no_others() -> None:
    """Of the files of the page it says nothing."""
    described = {
        (path, method.upper())
        for path, operations in DESCRIBED["paths"].items()
        for method in operations
        if method != "parameters"
    }
    files = page.FILES.keys() - {"/openapi.json"}
    there = {
        (route.path_format, method)
        for route in app.ROUTES
        for method in (route.methods or set()) - {"HEAD"}
        if route.path not in files
    }
    assert described == there


def test_a_job_has_the_fields_of_a_request() -> None:
    properties = DESCRIBED["components"]["schemas"]["JobRequest"]["properties"]
    assert properties.keys() == {*SETTINGS, "model", "previews", "client"}
    for name, most in LIMITS.items():
        assert properties[name]["maximum"] == most
    assert f"{MOST_PIXELS:,} pixels" in DESCRIBED["components"]["schemas"]["Image"]["description"]


def test_it_is_served(tiny: Running) -> None:
    """With a tag by which a browser finds that it has it."""
    answer = tiny.get("/openapi.json")
    assert answer.json == DESCRIBED and answer.headers["Cache-Control"] == "no-cache"
    again = tiny.get("/openapi.json", **{"If-None-Match": f'"other", W/{answer.headers["ETag"]}'})
    assert again.status == 304 and again.body == b""


def check(case: schemathesis.Case, server: Running) -> None:
    """That an answer is one of those described, and no fault of ours."""
    if isinstance(case.body, dict):
        for name, most in COUNTS.items():
            if isinstance(value := case.body.get(name), int) and value > most:
                case.body[name] = most
    with requests.Session() as session:
        session.trust_env = False
        response = case.call(base_url=server.url, session=session, timeout=PATIENCE)
    case.validate_response(response, checks=CHECKS)


def examples(count: int) -> Any:
    """So many requests of each operation, right and wrong ones, the same each time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # schemathesis does
@SCHEMA.parametrize()
@examples(3)
def test_answers_are_as_it_says(case: schemathesis.Case, tiny: Running) -> None:
    check(case, tiny)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@SCHEMA.parametrize()
@examples(100)
def test_many_answers_are_as_it_says(case: schemathesis.Case, tiny: Running) -> None:
    check(case, tiny)
