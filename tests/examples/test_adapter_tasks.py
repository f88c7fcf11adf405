import re

import pytest

from examples.adapter_tasks import TASKS, Task, split_of
from examples.jobs import writing

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
CHECKABLE = {name: task for name, task in TASKS.items() if task.is_checkable}


def needs_shared_data(task: Task) -> bool:
    return task.make_train is not None and not writing.shared_data().is_dir()


@EVERY_TASK
def test_examples_depend_on_the_seed_alone(task: Task) -> None:
    first = task.make_examples("heldout", 32, seed=3)

    assert task.make_examples("heldout", 32, seed=3) == first
    assert task.make_examples("heldout", 32, seed=4) != first


@EVERY_TASK
def test_no_held_out_prompt_is_ever_trained_on(task: Task) -> None:
    if needs_shared_data(task):
        pytest.skip("trained on data that is not in this repository: set CALUMMA_SHARED")
    train = task.make_examples("train", task.training.examples, seed=0)
    heldout = task.make_examples("heldout", 50, seed=1)

    assert len({e.prompt for e in train}) == task.training.examples
    assert len({e.prompt for e in heldout}) == 50
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    assert all(split_of(e.prompt) == "train" for e in train)


@pytest.mark.parametrize("task", CHECKABLE.values(), ids=CHECKABLE)
def test_the_reference_answer_is_right_and_others_are_not(task: Task) -> None:
    for example in task.make_examples("heldout", 50, seed=1):
        assert example.response
        assert task.check(example.response + "\n", example) is True
        assert task.check("", example) is False
        assert task.check(example.prompt, example) is False


def test_an_answer_wrapped_in_chatter_is_wrong() -> None:
    task = TASKS["sentiment"]
    example = task.make_examples("heldout", 1, seed=1)[0]

    assert task.check(f"The sentiment is {example.response}.", example) is False


def test_only_the_result_of_a_worked_solution_counts() -> None:
    task = TASKS["arithmetic"]
    example = task.make_examples("heldout", 1, seed=1)[0]
    result = example.response.rpartition("\n")[2]

    assert task.check(f"By another way:\n{result}", example) is True
    assert task.check(f"{result}0", example) is False


def test_open_ended_jobs_have_no_right_answer() -> None:
    for name in ("story", "coder"):
        example = TASKS[name].make_examples("heldout", 1, seed=1)[0]
        assert TASKS[name].check("anything", example) is None


def test_the_arithmetic_of_the_worked_solutions_is_true() -> None:
    for example in TASKS["arithmetic"].make_examples("heldout", 200, seed=2):
        equations = re.findall(r"(\d+ [*+-] \d+) = (\d+)", example.response)
        assert len(equations) == 2
        assert [eval(left) for left, _ in equations] == [int(right) for _, right in equations]
        assert example.response.endswith(f"#### {equations[-1][1]}")


def test_asking_for_more_examples_than_exist_fails() -> None:
    with pytest.raises(ValueError, match="story has only"):
        TASKS["story"].make_examples("heldout", 500, seed=0)


def test_the_set_of_shapes_is_as_promised() -> None:
    tasks = TASKS.values()

    assert len(CHECKABLE) >= 6
    assert {8, 16, 32, 64} <= {task.rank for task in tasks}
    assert {2, 4, 7} == {len(task.target_modules) for task in tasks}
    assert any(task.use_rslora for task in tasks)
    assert any(task.rank_pattern for task in tasks)
    assert len({task.alpha / task.rank for task in tasks}) >= 3
