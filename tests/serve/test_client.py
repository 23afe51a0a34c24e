"""Claims about the HTTP client: metrics are summed over engines, faults have their reason, no proxy for loopback."""

from __future__ import annotations

import pytest
import scripted

from serve.client import AnswerError, ask, parse_metrics, to_counters

METRICS = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="target"} 5.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.7e9
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 45.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 20.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="target",position="0"} 3.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_created gauge
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="target",position="0"} 1.7e9
"""


def test_metrics_are_summed_over_engines_and_creation_times_left_out() -> None:
    assert parse_metrics(METRICS, "num_requests_") == {"running": 7}
    assert to_counters(parse_metrics(METRICS, "spec_decode_")) == {
        "num_drafts": 15,
        "num_draft_tokens": 45,
        "num_accepted_tokens": 20,
        "accepted_at_0": 12,
    }
    assert to_counters({}) == {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}


def test_a_server_on_this_machine_is_reached_where_the_environment_names_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with scripted.serve() as server:
        assert ask(lambda client: client.is_healthy(server.url.removesuffix("/v1")))
        assert ask(lambda client: client.read_model(server.url)) == "scripted"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://host:port/v1", "no url"])
def test_a_url_that_leads_nowhere_is_a_reason_and_no_traceback(url: str) -> None:
    assert not ask(lambda client: client.is_healthy(url))
    with pytest.raises(AnswerError) as caught:
        ask(lambda client: client.read_model(url))
    assert caught.value.status == 0
