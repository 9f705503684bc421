"""What a coordinator tells of the runs of an earlier one."""

from __future__ import annotations

from pathlib import Path

from gradwire_coordinator.history import earlier_runs
from gradwire_coordinator.log import RunLog
from gradwire_protocol.v1 import coordinator_pb2, run_pb2


def begin(log: RunLog, run: str) -> None:
    log.create_run(run, 1, coordinator_pb2.CreateRunRequest(description=f"of {run}"))


def test_how_far_each_run_was_and_what_is_left_of_it(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        begin(log, "trained")
        for number in (1, 2, 3, 4):
            step = run_pb2.Entry(number=number, train_step=run_pb2.TrainStep(step=number + 10))
            evaluation = run_pb2.Entry(number=number, evaluate=run_pb2.Evaluate())
            log.append("trained", evaluation if number == 3 else step)
            if number < 4:
                log.record_result("trained", run_pb2.EntryResult(entry=number, loss=1.0 / number))
        log.record_checkpoint("trained", 1, coordinator_pb2.StoredCheckpoint(directory="a", step=11))
        begin(log, "loaded")
        log.append("loaded", run_pb2.Entry(number=1, load_state=run_pb2.LoadState(weight_version=7)))
        log.record_result("loaded", run_pb2.EntryResult(entry=1))
        begin(log, "empty")
        log.finish_run("empty", coordinator_pb2.RUN_STATE_ENDED, "its client closed it")
        log.fail_unfinished("the coordinator ended while it ran")
        empty, loaded, trained = earlier_runs(log, 50)
        assert [known.run for known in earlier_runs(log, 2)] == ["empty", "loaded"]
    assert (trained.description, trained.state) == ("of trained", coordinator_pb2.RUN_STATE_FAILED)
    assert trained.reason == "the coordinator ended while it ran"
    # The evaluation behind it is no step, and the step that was not finished is none either.
    assert (trained.step, trained.loss) == (12, 0.5)
    assert (trained.last_entry, trained.finished_entry) == (4, 3)
    assert (trained.checkpoint.directory, trained.checkpoint.step) == ("a", 11)
    assert (loaded.step, loaded.HasField("loss"), loaded.HasField("checkpoint")) == (7, False, False)
    assert (empty.step, empty.last_entry, empty.state) == (0, 0, coordinator_pb2.RUN_STATE_ENDED)
