"""Thousands of requests made from the server's own description: none makes a 500, hangs, or leaves anything behind."""

import os
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from sala.serve.server import EngineLimits

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.abuse

# for each operation of the API and each way, of fitting bodies and of wrong ones
EXAMPLES = int(os.environ.get("SALA_EXAMPLES", "750"))


def test_every_request_is_answered_and_no_answer_is_a_failure(serving):
    statuses: Counter[int] = Counter()
    with serving(max_length=64, limits=EngineLimits(chunk=64)) as live:
        schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        for operation in operations:
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)

                @seed(0)
                @settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    database=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=strategy)
                def ask(case):
                    response = case.call(timeout=600)
                    statuses[response.status_code] += 1
                    assert response.status_code < 500, (case.as_curl_command(), response.text)
                    if response.status_code >= 400:
                        found = response.json()["error"]
                        assert set(found) == {"message", "type", "param", "code"} and found["message"]

                # a route without parameters cannot be asked wrongly
                with suppress(Unsatisfiable):
                    ask()
                print(operation.label, mode.name, statuses.total(), flush=True)
        live.settled()
    print(dict(statuses), statuses.total(), "requests", len(operations), "operations")
