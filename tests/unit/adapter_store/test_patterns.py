import time

import pytest

from services.adapter_store.patterns import Pattern, check_cost, compile_pattern
from services.common.errors import Reason, RpcError

PATH = "model.layers.100.self_attn.gate_proj"


def _compile(text: str) -> Pattern:
    return compile_pattern(text, field="target_modules")


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
        r"(model\.)?layers\.[0-9]{1,3}\.self_attn\..*_proj",
        r"[^(){}*+]*gate_proj",
    ],
)
def test_expressions_in_use_are_accepted(text: str) -> None:
    assert _compile(text).regex.fullmatch(PATH)


@pytest.mark.parametrize(
    "text",
    [
        r"(a+)+$",
        r"(a|a)*$",
        r"(.*)(.*)(.*)(.*)(.*)x",
        r"(?=.*q)(?!.*k).*",
        r"(.)\1",
        r"(?i)Q_PROJ",
        ".*" * 50,
        "a?" * 40 + "a" * 40,
        "(e|e)" * 30 + "x",
        "(((a|b)|(a|b))|c){2}",
        "x" * 3000,
    ],
)
def test_expressions_that_could_run_for_ever_are_refused(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        _compile(text)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


@pytest.mark.parametrize("text", ["[[a]", "[a--b]", "[a&&b]", "[a~~b]", "[a||b]"])
def test_what_python_may_come_to_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        _compile(text)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


@pytest.mark.parametrize("text", ["(", "a)", "[", "*a", "a{5,2}", "a\\", "(?P<idx>a)(?P<idx>b)"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        _compile(text)
    assert caught.value.reason is Reason.ADAPTER_INVALID


def test_the_worst_accepted_expression_takes_milliseconds() -> None:
    pattern = _compile(r".*e.*e.*(?:e|e|e)?(?:e|e)x")
    started_s = time.perf_counter()
    assert pattern.regex.fullmatch("e" * len(PATH)) is None
    assert time.perf_counter() - started_s < 5.0


def test_many_expressions_count_together() -> None:
    pattern = _compile(r".*e.*e.*x")
    check_cost(pattern, field="rank_pattern")
    with pytest.raises(RpcError):
        check_cost(*[pattern] * 20, field="rank_pattern")
