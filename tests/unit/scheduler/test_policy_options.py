"""A policy's options are texts that become its config, or a message that names what is wrong."""

from dataclasses import dataclass

import pytest

from services.common.config import split_options
from services.core.bounds import require_positive
from services.core.policies import POLICIES
from services.scheduler.options import read_options


@dataclass(frozen=True, slots=True)
class Config:
    """What a policy's config may look like."""

    patience: float = 8.0
    passers: int = 16
    refuses: bool = True
    limit_s: float | None = None
    cutoffs: tuple[float, ...] = (1.0, 2.0)
    form: str = "linear"

    def __post_init__(self) -> None:
        assert self.passers >= 0
        require_positive(patience=self.patience)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("patience=4", Config(patience=4.0)),
        ("passers=3, refuses=false", Config(passers=3, refuses=False)),
        ("limit_s=2.5", Config(limit_s=2.5)),
        ("cutoffs=1,2.5,9,form=square", Config(cutoffs=(1.0, 2.5, 9.0), form="square")),
        ("cutoffs=[3]", Config(cutoffs=(3.0,))),
    ],
)
def test_options_take_the_types_of_their_fields(text: str, config: Config) -> None:
    assert read_options(Config, split_options(text)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "no option 'speed'; there are: patience, passers, refuses"),
        ("passers=1.5", "passers=1.5: Input should be a valid integer"),
        ("passers=-1", "passers=-1: out of bounds"),
        ("patience=0", "patience must be positive"),
        ("patience=nan", "patience must be positive"),
        ("cutoffs=1,x", "cutoffs=1,x: Input should be a valid number"),
        ("refuses=perhaps", "refuses=perhaps: Input should be a valid boolean"),
        ("patience", "'patience' must be key=value"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_options(Config, split_options(text))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_built_without_options(name: str) -> None:
    assert read_options(POLICIES[name].config, {}) == POLICIES[name].config()
