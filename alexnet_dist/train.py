"""Train AlexNet: alone, or as one of the processes that torchrun starts.

torchrun --nproc_per_node=2 -m alexnet_dist.train --config configs/imagenette.yaml --data.root DIR
"""

import time
from pathlib import Path
from typing import Any, NoReturn

from alexnet_dist.assembly import telling
from alexnet_dist.assembly.parts import Images, Learner, check_network
from alexnet_dist.config import (
    Config,
    ParsedArgs,
    check_resume_compatible,
    diff_configs,
    parse,
    time_limit,
    to_dict,
)
from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.parallel.hang_detector import HangDetector
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.tracking.logger import Logger, end_message, start_message
from alexnet_dist.tracking.run_dir import RunDir, read_config, resolve_run_dir
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.optim import momentum_buffers
from alexnet_dist.training.preemption import INTERRUPT, Preempted, PreemptionHandler
from alexnet_dist.training.step import (
    StepThrottle,
    StepTimer,
    TrainMetrics,
    check_all_images_counted,
    evaluate,
)


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    parsed = parse(arguments, __doc__)
    runtime = parsed.config.runtime
    mesh = init_distributed(runtime.device, runtime.threads, runtime.hang_timeout)
    check_network(parsed.config, mesh)
    folder, path, kept = _open_run(mesh, parsed)
    try:
        if kept:
            parsed = parse(arguments, __doc__, base_config=kept)
            check_network(parsed.config, mesh)
        run = Run(parsed.config, mesh.with_layout(parsed.config.parallel.towers), folder, path)
        run.train()
    except UserError as failure:  # for a person to mend: to start again by itself is of no use
        if folder is not None or not failure.on_all_ranks:
            RunDir(path).set_status("failed")
        raise


BAD_STEPS_IN_A_ROW = 10
"""After so many steps without a finite loss and gradient, more of them will not help."""

HASTE_SECONDS = 5.0
"""For Weights & Biases to hear the last, where the run has been told to leave."""


class Run:
    """One life of a training run: what it is made of, and where it stands."""

    def __init__(self, config: Config, mesh: Mesh, folder: RunDir | None, path: Path) -> None:
        self.config, self.mesh, self.path = config, mesh, path
        self.images = Images(config, mesh)
        self.learner = Learner(config, mesh, self.images)
        self.layout, self.optimizer = self.learner.layout, self.learner.optimizer
        keep = config.checkpoint
        self.checkpoints = CheckpointManager(
            path / "checkpoints",
            mesh.checkpoint_group,
            self.layout,
            self.optimizer,
            lambda event, **values: self.report.emit(event, **values),
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            async_save=keep.async_save,
        )
        self.step = 0
        self.evaluated = -1  # the step of the last evaluation
        self.meters = TrainMetrics(config.data.batch_size, mesh.dp_size)
        self.before, self.damaged = self._restore()  # the options of the life before, if any
        self.clock, self.pace = StepTimer(), StepThrottle(mesh.device)
        self.report = Logger(
            folder,
            to_dict(config),
            total_steps=self.steps,
            steps_per_epoch=self.images.plan.steps_per_epoch,
            wandb_mode=config.wandb.mode,
            wandb_project=config.wandb.project,
            log_images=config.wandb.log_images,
        )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        train = self.config.train
        return max(round(train.epochs * train.epochs_scale * self.images.plan.steps_per_epoch), 1)

    @property
    def passes(self) -> float:
        """Passes over the training images so far."""
        return self.step / self.images.plan.steps_per_epoch

    def train(self) -> None:
        """Train to the end of the run, or to train.max_steps of it, or until it is told to stop.

        Raises:
            Failure: something that a person has to mend.
            SystemExit: it was stopped by Ctrl-C, and is saved.
        """
        last = min(self.config.train.max_steps or self.steps, self.steps)
        if self.step >= last and self.evaluated == self.step:
            self._already_there(last)
            return
        run, mesh = self.config.run, self.mesh
        self.watch = HangDetector(mesh, self.config.runtime.hang_timeout)
        self.preemption = PreemptionHandler(
            self.path,
            mesh.long_timeout_group,
            signals=tuple(run.preempt_signals),
            time_limit=time_limit(run),
            grace=run.sigterm_grace,
            before_exit=self.report.stop_progress_bar,
        )
        try:
            self._agree()
            self._announce()
            if mesh.world_size > 1:
                self.learner.warm_up()
            self._train(last)
        except Preempted as stop:
            self._leave(stop.reason)
        except BaseException:
            self.report.stop_progress_bar()
            raise
        finally:
            self.watch.close()

    def _train(self, last: int) -> None:
        result: dict[str, float] = {}
        while self.step < last or self.evaluated < self.step:
            end = min(last, (self._epoch + 1) * self.images.plan.steps_per_epoch)
            if not self._wants_evaluation(last):
                self._train_to(end)
            self._collect()
            result = self._end_epoch()
        self.checkpoints.wait()
        self.preemption.close()
        self.watch.close()
        self._finish(result)

    def _wants_evaluation(self, last: int) -> bool:
        """Whether training has come to where it is evaluated, and was stopped before it was."""
        due = self.step > 0 and (
            self.step % self.images.plan.steps_per_epoch == 0 or self.step >= last
        )
        return due and self.evaluated < self.step

    def _end_epoch(self) -> dict[str, float]:
        """Evaluate, and save what training has come to."""
        whole = self.step % self.images.plan.steps_per_epoch == 0 or self.step == self.steps
        result = self.evaluate()
        self._record_epoch()
        self.evaluated = self.step
        if whole:
            self.learner.schedule.step_metric(result["top1_error"])
            self.meters.next_epoch()
        self.checkpoints.wait()
        best = self.checkpoints.best
        better = whole and (best is None or result["top1_error"] < best["top1_error"])
        self.save(best={**result, "step": self.step} if better else None)
        return result

    @property
    def _epoch(self) -> int:
        return self.step // self.images.plan.steps_per_epoch

    def _train_to(self, end: int) -> None:
        """Steps up to ``end``, which lies in this epoch or is its last."""
        config = self.config
        plan = self.images.plan
        draws = plan.epoch(self._epoch, self.step % plan.steps_per_epoch, self.mesh.batch_slice)
        batches = self.images.engine.batches(draws)
        try:
            self.clock.start()
            while self.step < end:
                self.watch.heartbeat(f"waiting for the images of step {self.step + 1}")
                batch = next(batches)
                self.clock.mark_data_ready()
                if self.step == 0:
                    telling.show_first(self.report, self.images, batch)
                self.watch.heartbeat(f"computing step {self.step + 1}")
                rates = self.learner.set_rates(self.passes)
                masks = self.learner.masks(self.step)
                result = self.learner.take_step(batch, masks)
                self.pace.step_launched(batch)
                self.step += 1
                self.meters.add(self.step, result, batch.indices)
                self.clock.mark_step_done()
                if self.step % config.train.log_interval == 0:
                    self._record(rates)
                every = config.checkpoint.interval_steps
                if every and self.step % every == 0 and self.step < end:
                    self.save()
                self.preemption.check_stop(
                    2 * self.clock.longest_step + 2 * self.checkpoints.longest_save
                )
        finally:
            batches.close()

    def _record(self, rates: dict[str, float]) -> None:
        """A line of the records: the steps since the last one."""
        self._report_bad(self.images.engine)
        self._collect()
        self.checkpoints.wait(block=False)
        steps = len(self.meters.losses)
        loss, error = self.meters.pop_averages()
        seconds, waited, timed_steps = self.clock.pop_times()
        timed = timed_steps * self.config.data.batch_size
        self.report.emit(
            "train",
            step=self.step,
            epoch=self.passes,
            loss=loss,
            top1_error=error,
            lr=rates["weights"],
            lrs=rates,
            pca_noise_std=self.images.plan.pca_noise_std(
                (self.step - 1) / self.images.plan.steps_per_epoch
            ),
            steps=steps,
            images_per_second=timed / max(seconds, 1e-9),
            data_time_fraction=waited / max(seconds, 1e-9),
            comm_time_fraction=self.layout.comm_timer.pop_seconds() / max(seconds, 1e-9),
            seconds=seconds,
        )

    def _record_epoch(self) -> None:
        """What the epoch so far was made of."""
        self._report_bad(self.images.engine)
        steps = max(self.meters.epoch_steps, 1)
        self.report.emit(
            "epoch",
            step=self.step,
            epoch=self.passes,
            images=self.meters.epoch_images,
            sample_order_hash=self.meters.sample_order_hash,
            loss=self.meters.epoch_loss / steps,
            top1_error=100.0
            * (1 - self.meters.epoch_num_correct / max(self.meters.epoch_images, 1)),
        )

    def evaluate(self) -> dict[str, float]:
        """Exact errors over the validation images, recorded."""
        begin = time.perf_counter()
        longest, last = 0.0, begin

        def between() -> None:
            nonlocal longest, last
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            self.watch.heartbeat(f"evaluating after step {self.step}")
            self.preemption.check_stop(2 * longest + 2 * self.checkpoints.longest_save)

        batches = self.images.val_engine.batches(
            self.images.evaluation.batches(self.mesh.batch_slice)
        )
        try:
            with self.layout.comm_timer.paused():
                result = evaluate(self.layout, batches, self.mesh.device, between)
        finally:
            batches.close()
        left_out = self._report_bad(self.images.val_engine)
        check_all_images_counted(result, left_out, len(self.images.catalogue.val))
        if left_out:
            result["num_skipped"] = left_out
        seconds = time.perf_counter() - begin
        self.report.emit("eval", step=self.step, epoch=self.passes, **result, seconds=seconds)
        return result

    def _report_bad(self, engine: Loader) -> int:
        """Record the images that were replaced or left out, of all processes; how many."""
        mine = engine.corrupt.pop_events() if self.mesh.is_replica_leader else []
        news = [event for each in self.mesh.all_gather_object(mine) for event in each]
        for event in news:
            self.report.emit("corrupt_image", step=self.step, **event)
        return len(news)

    # checkpoints

    def save(self, best: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint of this step, of which ``best`` may be the evaluation."""
        self.watch.heartbeat(f"saving step {self.step}")
        self._collect()
        if not self.checkpoints.weights_finite():
            self._not_finite(self.step, "a weight is not finite")
        catalogue = self.images.catalogue
        standing = {
            "run": self.path.name,
            "step": self.step,
            "last_eval_step": self.evaluated,
            "schedule": self.learner.schedule.state_dict(),
            "metrics": self.meters.state_dict(),
            "scaler": self.layout.scaler.state_dict(),
            "config": to_dict(self.config),
            "classes": catalogue.train.classes,
            "statistics": catalogue.stats.to_json(),
            "dataset_hash": catalogue.dataset_hash,
            "images": {"train": len(catalogue.train), "val": len(catalogue.val)},
            "wandb_id": self.report.wandb_id,
            "versions": telling.versions(),
        }
        self.checkpoints.save(standing, best)
        self.clock.start()

    def _restore(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Go on from the run's newest checkpoint that is whole, or begin; the options of the life
        that wrote it, and a sentence for each that was damaged."""
        state, damaged = self.checkpoints.restore(self._refuse_other)
        if state is None:
            return None, damaged + self._begin()
        self.step, self.evaluated = state["step"], state["last_eval_step"]
        self.learner.schedule.load_state_dict(state["schedule"])
        self.meters.load_state_dict(state["metrics"])
        if state["scaler"]:  # empty where the run was not in fp16 before
            self.layout.scaler.load_state_dict(state["scaler"])
        return state["config"], damaged

    def _refuse_other(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of a run that meant something else."""
        way_out = (
            f"the run in {self.path} has trained for {state['step']} steps otherwise, and another "
            "one begins by --run.name NAME or --run.resume never"
        )
        check_resume_compatible(state["config"], to_dict(self.config), way_out)
        catalogue = self.images.catalogue
        if state["dataset_hash"] != catalogue.dataset_hash:
            raise UserError(
                f"the images below {catalogue.train.folder} are others than before: {way_out}",
                on_all_ranks=True,
            )

    def _begin(self) -> list[str]:
        """Stand at step 0, with initial weights or those asked for; a sentence where these do not
        have all."""
        self.learner.draw()
        for velocity in momentum_buffers(self.optimizer, self.layout.parameters).values():
            velocity.zero_()
        self.step, self.evaluated, self.checkpoints.best = 0, -1, None
        self.meters = TrainMetrics(self.config.data.batch_size, self.mesh.dp_size)
        path = self.config.model.pretrained
        anew = self.checkpoints.load_pretrained(path) if path else []
        return [f"{path} has no {', '.join(anew)} for this network: drawn anew"] if anew else []

    def _leave(self, cause: str) -> None:
        """Save, and end before the run does, to go on another time."""
        here = (self.step, self.evaluated)
        self.checkpoints.wait()
        if self.checkpoints.last_saved != here:
            self.save()
            self.checkpoints.wait()
        self.report.emit("preempted", step=self.step, epoch=self.passes, cause=cause)
        by_hand = cause == INTERRUPT
        self.report.close("stopped" if by_hand else "preempted", self.step, HASTE_SECONDS)
        saved = (
            "saved; the" if self.checkpoints.last_saved == here else "NOT saved, as said above; the"
        )
        self.report.print(
            f"stopped by {cause} at step {here[0]} of {self.steps}, {saved} same command goes on"
        )
        self.images.close()
        if by_hand:
            raise SystemExit(130)

    def _warn(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self.report.emit("warning", step=self.step, message=sentence)

    # numbers that are not finite

    def _collect(self) -> None:
        """Read the meters, and see to steps whose numbers have left the finite, before they can
        reach a checkpoint.

        Raises:
            Failure: unless train.on_nonfinite is skip, and not too many steps in a row were bad.
        """
        bad = self.meters.reduce()
        if not bad:
            return
        guarded = self.layout.scaler.skip_nonfinite
        for one in bad if guarded else bad[:1]:  # without a guard the others follow from it
            paths = [
                self.images.engine.corrupt.dataset.path(number) for number in one.indices.tolist()
            ]
            self.report.emit(
                "nonfinite", step=one.step, what=one.description, skipped=guarded, paths=paths
            )
        if not guarded or self.meters.consecutive_nonfinite >= BAD_STEPS_IN_A_ROW:
            self._not_finite(bad[0].step, bad[0].description)

    def _not_finite(self, step: int, what: str) -> NoReturn:
        raise UserError(
            f"{what} at step {step}: take a smaller --optim.lr (it is {self.config.optim.lr:g}), "
            "or a warm-up by --optim.schedule.warmup_epochs 1; the last checkpoint is intact",
            on_all_ranks=True,
        )

    # what people see

    def _agree(self) -> None:
        """See to it that all processes were given the same run, and share its images out."""
        mine = (to_dict(self.config), self.images.catalogue.dataset_hash, self.step)
        rows = (
            range(self.config.data.batch_size)[self.mesh.batch_slice]
            if self.mesh.is_replica_leader
            else range(0)
        )
        everyone = self.mesh.all_gather_object((mine, rows))
        positions = sorted(position for _, rows in everyone for position in rows)
        if any(one != mine for one, _ in everyone) or positions != list(range(len(positions))):
            raise UserError(
                "the processes of this run were started with different options, or do not all "
                "reach the same run folder: give every machine the same command line",
                on_all_ranks=True,
            )

    def _announce(self) -> None:
        known = telling.facts(self.mesh, self.images, self.learner)
        config = to_dict(self.config)
        self.report.print(start_message(self.config.model.arch, known, self.path))
        if self.before is None:
            self.report.emit("start", step=0, epoch=0.0, config=config, **known)
        else:
            changed = diff_configs(self.before, config)
            self.report.emit("resume", step=self.step, epoch=self.passes, changed=changed, **known)
        self._warn(self.damaged)

    def _finish(self, result: dict[str, float]) -> None:
        ended = self.step >= self.steps
        telling.show_predictions(self.report, self.images, self.learner, self.mesh, self.step)
        self.report.plot_curves(self.step)
        tensors = self.checkpoints.state_tensors()
        telling.show_kernels(self.report, self.config, tensors, self.step)
        self.report.emit(
            "finished",
            step=self.step,
            epoch=self.passes,
            ended=ended,
            **result,
            best=self.checkpoints.best,
        )
        self.report.close("ended" if ended else "stopped", self.step)
        self.images.close()
        stopped = "" if ended else f"step {self.step} of {self.steps}"
        hint = telling.hint(self.images)
        self.report.print(end_message(result, self.path, stopped_at=stopped, hint=hint))

    def _already_there(self, last: int) -> None:
        self.report.close("ended" if self.step >= self.steps else "stopped", self.step)
        self.report.print(
            f"{self.path} is at step {self.step} already, and was asked for {last}: raise "
            "--train.max_steps or --train.epochs, or begin anew by --run.resume never"
        )


def _open_run(mesh: Mesh, parsed: ParsedArgs) -> tuple[RunDir | None, Path, dict[str, Any]]:
    """The run's folder (on rank 0), its path, and the options it keeps if the run goes on."""
    config = parsed.config
    opened: list[RunDir] = []

    def choose() -> tuple[str, dict[str, Any]]:
        name = config.run.name or parsed.config_name
        path, resumed = resolve_run_dir(config.run.output_dir, name, config.run.resume)
        folder = RunDir(path)
        folder.lock()
        folder.set_status("running")
        opened.append(folder)
        return str(path), read_config(path) if resumed else {}

    path, kept = mesh.broadcast_from_rank0(choose)
    return (opened[0] if opened else None), Path(path), kept


if __name__ == "__main__":
    run_command(main)
