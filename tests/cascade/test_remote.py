"""A remote model in the place of the attached one: what is asked, and what happens where it is dead, slow or strange."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from shadow_peft import RemoteModel, ShadowCascade
from shadow_peft.cascade.answers import Answer, AnsweredBy
from shadow_peft.cascade.remote import RemoteError
from tests.cascade.worlds import PROMPTS, FakeEndpoint, endpoint, tokenizer
from tests.tiny_models import causal_lm, classifier, llama, llama_classifier

ALWAYS, NEVER = float("inf"), float("-inf")
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "at once"])


def remote(told: FakeEndpoint, **settings: object) -> RemoteModel:
    return RemoteModel("big", told.base_url, **{"timeout": 10.0, **settings})  # type: ignore[arg-type]


def cascade(asked: RemoteModel, threshold: float = ALWAYS, takeover: str = "answer") -> ShadowCascade:
    """An exported shadow that asks an endpoint."""
    exported = causal_lm(llama()).export_shadow()
    return ShadowCascade(
        exported, tokenizer(), remote=asked, threshold=threshold, takeover=takeover, max_new_tokens=8, do_sample=False
    )


@STREAMED
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_a_good_endpoint_answers(stream: bool, chat: bool) -> None:
    with endpoint() as told:
        answer = cascade(remote(told, stream=stream, chat=chat)).answer("say one:")
    assert (answer.text, answer.answered_by, answer.shadow_tokens) == (" from afar", AnsweredBy.REMOTE, 0)
    assert (answer.tokens, answer.reason) == (None, None)
    ((path, body),) = told.requests
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    expected = {"messages": [{"role": "user", "content": "say one:"}]} if chat else {"prompt": "say one:"}
    settings = {"model": "big", "stream": stream, "temperature": 0, "max_tokens": 8}
    assert body == {**expected, **settings}


def test_a_key_is_sent_only_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    with endpoint() as told:
        remote(told).complete("x")
        asked = remote(told, api_key="of-this-one")
        asked.complete("x")
    assert told.keys == ["Bearer none", "Bearer of-this-one"]
    assert "of-this-one" not in repr(asked)


def test_messages_are_a_chat() -> None:
    messages = [{"role": "user", "content": "hello"}]
    with endpoint() as told:
        assert remote(told).complete(messages) == " from afar"
        with pytest.raises(ValueError, match="cannot continue the answer of a chat"):
            remote(told).complete(messages, "well")
    assert told.requests[0][0] == "/v1/chat/completions"


def test_it_is_asked_only_where_the_shadow_is_unsure() -> None:
    with endpoint() as told:
        own = cascade(remote(told), NEVER).answers(PROMPTS)
        assert told.requests == []
        middle = sorted(a.confidence for a in own)[2]
        answers = cascade(remote(told), middle).answers(PROMPTS)
    assert [a.answered_by for a in answers].count(AnsweredBy.REMOTE) == len(told.requests) == 2
    assert all(b == a for a, b in zip(own, answers, strict=True) if b.answered_by is AnsweredBy.SHADOW)


def test_within_an_answer_it_continues_what_the_shadow_wrote() -> None:
    with endpoint() as told:
        for prompt in PROMPTS:
            own = cascade(remote(told), NEVER, "token").answer(prompt)
            answer = cascade(remote(told), own.confidence + 1e-9, "token").answer(prompt)  # takes over at the least sure
            if answer.answered_by is AnsweredBy.SHADOW_THEN_REMOTE:
                break
    written = tokenizer().decode(list(own.tokens or ())[: answer.shadow_tokens])
    assert 0 < answer.shadow_tokens < 8
    assert answer.text == written + " from afar"
    assert told.requests[-1][1]["prompt"] == prompt + written
    assert told.requests[-1][1]["max_tokens"] == 8 - answer.shadow_tokens


# ---------------------------------------------------------------- failures


def failed(asked: RemoteModel, takeover: str = "answer") -> Answer:
    """The answer where the remote model fails: the shadow's own, marked."""
    own = cascade(asked, NEVER).answer(PROMPTS[0])
    answer = cascade(asked, takeover=takeover).answer(PROMPTS[0])
    assert answer.answered_by is AnsweredBy.SHADOW_REMOTE_FAILED
    assert (answer.text, answer.tokens) == (own.text, own.tokens)
    assert answer.reason
    return answer


@STREAMED
@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_a_dead_endpoint_leaves_the_shadows_answer(stream: bool, takeover: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        asked = RemoteModel("big", f"http://127.0.0.1:{port}/v1", timeout=10, stream=stream)
        assert "APIConnectionError" in str(failed(asked, takeover).reason)


@STREAMED
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("error", "InternalServerError"), ("garbage", ""), ("not json", ""), ("no text", "the answer is no text but int")],
)
def test_a_strange_endpoint_leaves_the_shadows_answer(stream: bool, kind: str, reason: str) -> None:
    with endpoint(kind) as told:
        assert reason in str(failed(remote(told, stream=stream)).reason)
        assert len(told.requests) == 1, "it is asked once"


def test_an_answer_that_breaks_off_is_none() -> None:
    with endpoint("broken off") as told:
        assert failed(remote(told)).reason == "the answer broke off"


@STREAMED
def test_a_slow_endpoint_is_not_waited_for(stream: bool) -> None:
    late = r"within 0\.5 s|Timeout"  # it would answer after 20 s
    with endpoint("slow") as told, pytest.raises(RemoteError, match=late):
        remote(told, stream=stream, timeout=0.5).complete("x")


def test_an_endpoint_that_drips_is_not_waited_for() -> None:
    with endpoint("dripping", "x" * 100) as told:  # 30 s in all, and never silent for longer than 0.3 s
        with pytest.raises(RemoteError, match="no complete answer within 1 s"):
            remote(told, timeout=1.0).complete("x")
        assert "within 1 s" in str(failed(remote(told, timeout=1.0)).reason)


def test_measuring_needs_every_answer() -> None:
    with endpoint("error") as told, pytest.raises(RemoteError, match="InternalServerError"):
        cascade(remote(told)).measure([{"prompt": "a", "completion": "b"}])


# ---------------------------------------------------------------- at the edge


def test_an_exported_shadow_needs_nothing_else(tmp_path: Path) -> None:
    model = causal_lm(llama())
    model.export_shadow().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with endpoint() as told:
        settings = {"max_new_tokens": 8, "do_sample": False}
        made = ShadowCascade.from_pretrained(tmp_path, remote=remote(told), **settings)
        data = [{"prompt": f"{p} {i}", "completion": "from afar"} for i, p in enumerate(PROMPTS * 12)]
        made.calibrate(data, 0.5, promise="escalations")
        made.save_calibration(tmp_path)
        again = ShadowCascade.from_pretrained(tmp_path, remote=remote(told), **settings)
        prompts = [row["prompt"] for row in data]
        assert again.answers(prompts) == made.answers(prompts)
        asked = [a.answered_by is AnsweredBy.REMOTE for a in again.answers(prompts)]
        assert 0 < sum(asked) < len(asked)


def test_a_remote_model_names_a_class(tmp_path: Path) -> None:
    exported = classifier(llama_classifier()).export_shadow()
    exported.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with endpoint(text=" LABEL_1\n") as told:
        made = ShadowCascade.from_pretrained(tmp_path, remote=remote(told), threshold=ALWAYS)
        assert {(a.text, a.tokens, a.answered_by) for a in made.answers(PROMPTS)} == {("LABEL_1", (1,), AnsweredBy.REMOTE)}
        told.text = "banana"
        answer = made.answer("x")
    assert answer.reason == "the answer 'banana' is no class"
    assert answer.answered_by is AnsweredBy.SHADOW_REMOTE_FAILED
    assert answer.tokens == ShadowCascade(exported, tokenizer(), remote=made.remote, threshold=NEVER).answer("x").tokens


def test_a_remote_model_refuses_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timeout must be above 0"):
            RemoteModel("m", "http://x", timeout=timeout)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError):
        RemoteModel("m", "http://x")
