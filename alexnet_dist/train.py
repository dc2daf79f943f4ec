"""Train AlexNet, alone or as one of the processes that torchrun starts.

torchrun --nproc_per_node=2 -m alexnet_dist.train --config configs/imagenette.yaml --data.root DIR
"""

import contextlib
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch.distributed.tensor import DTensor

from alexnet_dist import setup
from alexnet_dist.config import (
    CommandParser,
    Config,
    ParsedArgs,
    check_resume_compatible,
    diff_configs,
    time_limit,
    to_dict,
)
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.datasets import DIGITS
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel.hang_detector import HangDetector
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.tracking.logger import QUICKSTART_HINT, Logger, end_message, start_message
from alexnet_dist.tracking.run_dir import RunDir, read_config, resolve_run_dir, restart_info
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.evaluation import check_all_images_counted, evaluate
from alexnet_dist.training.preemption import INTERRUPT, Preempted, PreemptionHandler
from alexnet_dist.training.step import StepThrottle, StepTimer, TrainMetrics, set_lr

MAX_CONSECUTIVE_NONFINITE = 10
"""After so many steps without a finite loss and gradient, more of them will not help."""

WANDB_FLUSH_TIMEOUT = 5.0
"""Seconds for Weights & Biases to receive the last events of a preempted run."""


class Trainer:
    """A training run: what it is made of, and how far it is."""

    def __init__(self, config: Config, mesh: Mesh, run_dir: RunDir | None, path: Path) -> None:
        self.config, self.mesh, self.path = config, mesh, path
        self.data = setup.build_data(config, mesh)
        self.state = setup.build_training(config, mesh, len(self.data.info.train.classes))
        self.layout = self.state.layout
        self.step, self.last_eval_step = 0, -1
        self.steps_per_epoch = self.data.plan.steps_per_epoch
        epochs = config.train.epochs * config.train.epochs_scale
        self.total_steps = max(round(epochs * self.steps_per_epoch), 1)
        self.last_step = min(config.train.max_steps or self.total_steps, self.total_steps)
        self.metrics = TrainMetrics(config.data.batch_size, mesh.dp_size)
        self.timer, self.throttle = StepTimer(), StepThrottle(mesh.device)
        self.checkpoints = CheckpointManager(
            path / "checkpoints",
            mesh.checkpoint_group,
            self.layout,
            self.state.optimizer,
            emit=lambda event, **values: self.logger.emit(event, **values),
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            async_save=config.checkpoint.async_save,
        )
        self.resumed_config, self.warnings = self._restore_or_initialize()
        self.logger = Logger(
            run_dir,
            to_dict(config),
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            wandb_mode=config.wandb.mode,
            wandb_project=config.wandb.project,
            log_images=config.wandb.log_images,
        )

    def train(self) -> None:
        """Train to the end of the run, or to train.max_steps of it, or until told to stop.

        Raises:
            UserError: something that a person has to fix.
            SystemExit: it was stopped by Ctrl-C, and is saved.
        """
        if self.step >= self.last_step and self.last_eval_step == self.step:
            self._report_nothing_to_do()
            return
        run = self.config.run
        self.hang_detector = HangDetector(self.mesh, self.config.runtime.hang_timeout)
        self.preemption = PreemptionHandler(
            self.path,
            self.mesh.long_timeout_group,
            signals=tuple(run.preempt_signals),
            time_limit=time_limit(run),
            grace=run.sigterm_grace,
            before_exit=self.logger.stop_progress_bar,
        )
        try:
            self._check_ranks_agree()
            self._log_start()
            self.layout.warm_up(self.config.data.image_size)
            while self.step < self.last_step or self.last_eval_step < self.step:
                if not self._evaluation_due():
                    self._train_epoch()
                if self.metrics.has_unlogged_steps:
                    self._log_step()
                result = self._evaluate_and_save()
            self.checkpoints.wait()
            self.preemption.close()
            self.hang_detector.close()
            self._finish(result)
        except Preempted as stop:
            self._save_and_exit(stop.reason)
        except BaseException:
            self.logger.stop_progress_bar()
            raise
        finally:
            self.hang_detector.close()

    def _train_epoch(self) -> None:
        """Steps to the end of this epoch, or to the last step."""
        config, plan, state = self.config, self.data.plan, self.state
        epoch, first = divmod(self.step, self.steps_per_epoch)
        end = min(self.last_step, (epoch + 1) * self.steps_per_epoch)
        samples = plan.epoch(epoch, first, self.mesh.batch_slice)
        with contextlib.closing(self.data.loader.batches(samples)) as batches:
            self.timer.start()
            while self.step < end:
                self.hang_detector.heartbeat(f"waiting for the images of step {self.step + 1}")
                batch = next(batches)
                self.timer.mark_data_ready()
                if self.step == 0:
                    self._log_first_batch(batch)

                self.hang_detector.heartbeat(f"computing step {self.step + 1}")
                set_lr(state.optimizer, state.schedule, self.step / self.steps_per_epoch)
                masks = self.layout.dropout_masks(config.train.seed, self.step)
                result = state.train_step(batch, masks)
                self.throttle.step_launched(batch)
                self.step += 1
                self.metrics.add(self.step, result, batch.indices)
                self.timer.mark_step_done()

                if self.step % config.train.log_interval == 0:
                    self._log_step()
                interval = config.checkpoint.interval_steps
                if interval and self.step % interval == 0 and self.step < end:
                    self._save()
                self.preemption.check_stop(
                    2 * self.timer.longest_step + 2 * self.checkpoints.longest_save
                )

    def _evaluation_due(self) -> bool:
        """Whether an epoch, or training, has ended, and was not evaluated before it was stopped."""
        at_end = self.step % self.steps_per_epoch == 0 or self.step >= self.last_step
        return self.step > 0 and at_end and self.last_eval_step < self.step

    def _evaluate_and_save(self) -> dict[str, float]:
        full_epoch = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        result = self.evaluate()
        self._log_epoch()
        self.last_eval_step = self.step
        if full_epoch:
            self.state.schedule.step_metric(result["top1_error"])
            self.metrics.next_epoch()
        self.checkpoints.wait()
        best = self.checkpoints.best
        is_best = full_epoch and (best is None or result["top1_error"] < best["top1_error"])
        self._save(best={**result, "step": self.step} if is_best else None)
        return result

    def evaluate(self) -> dict[str, float]:
        """Exact errors over the validation images, logged."""
        started = last = time.perf_counter()
        longest = 0.0

        def after_batch() -> None:
            nonlocal longest, last
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            self.hang_detector.heartbeat(f"evaluating after step {self.step}")
            self.preemption.check_stop(2 * longest + 2 * self.checkpoints.longest_save)

        loader, samples = self.data.eval_loader, self.data.eval_plan.batches(self.mesh.batch_slice)
        with contextlib.closing(loader.batches(samples)) as batches:
            result = evaluate(self.layout, batches, self.mesh.device, after_batch)
        skipped = self._log_corrupt_images(loader)
        check_all_images_counted(result, skipped, len(self.data.info.val))
        if skipped:
            result["num_skipped"] = skipped
        self._log("eval", **result, seconds=time.perf_counter() - started)
        return result

    # checkpoints

    def _save(self, best: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint of this step; ``best`` is its evaluation, if the best."""
        self.hang_detector.heartbeat(f"saving step {self.step}")
        self._check_finite()
        if not self.checkpoints.weights_finite():
            self._stop_nonfinite(self.step, "a weight is not finite")
        info = self.data.info
        state = {
            "run": self.path.name,
            "step": self.step,
            "last_eval_step": self.last_eval_step,
            "schedule": self.state.schedule.state_dict(),
            "metrics": self.metrics.state_dict(),
            "scaler": self.layout.scaler.state_dict() if self.layout.scaler else {},
            "config": to_dict(self.config),
            "classes": info.train.classes,
            "statistics": info.stats.to_json(),
            "dataset_hash": info.dataset_hash,
            "images": {"train": len(info.train), "val": len(info.val)},
            "wandb_id": self.logger.wandb_id,
            "versions": setup.VERSIONS,
        }
        self.checkpoints.save(state, best)
        self.timer.start()

    def _restore_or_initialize(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Resume from the newest valid checkpoint, or initialize the weights.

        Returns:
            The config of the attempt before, None at the beginning; and warnings to be logged.
        """
        state, warnings = self.checkpoints.restore(self._check_resumable)
        if state is not None:
            self.step, self.last_eval_step = state["step"], state["last_eval_step"]
            self.state.schedule.load_state_dict(state["schedule"])
            self.metrics.load_state_dict(state["metrics"])
            if state["scaler"] and self.layout.scaler:  # as far as fp16 is used, and was
                self.layout.scaler.load_state_dict(state["scaler"])
            return state["config"], warnings
        setup.init_weights(self.config, self.layout, len(self.data.info.train.classes))
        path = self.config.model.pretrained
        missing = self.checkpoints.load_pretrained(path) if path else []
        if missing:
            names = ", ".join(missing)
            warnings.append(f"{path} has no {names} for this network: initialized from scratch")
        return None, warnings

    def _check_resumable(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of a run with other images or a config that means another run."""
        alternative = (
            f"the run in {self.path} has trained for {state['step']} steps with it; start another "
            "run by --run.name NAME or --run.resume never"
        )
        check_resume_compatible(state["config"], to_dict(self.config), alternative)
        info = self.data.info
        if state["dataset_hash"] != info.dataset_hash:
            raise UserError(
                f"the images below {info.train.folder} are not those of before: {alternative}",
                on_all_ranks=True,
            )

    def _save_and_exit(self, cause: str) -> None:
        """Save, and end before the run does, to be resumed."""
        here = (self.step, self.last_eval_step)
        self.checkpoints.wait()
        if self.checkpoints.last_saved != here:
            self._save()
            self.checkpoints.wait()
        self._log("preempted", cause=cause)
        by_hand = cause == INTERRUPT
        self.logger.close("stopped" if by_hand else "preempted", self.step, WANDB_FLUSH_TIMEOUT)
        saved = "saved" if self.checkpoints.last_saved == here else "NOT saved, as said above"
        self.logger.print(
            f"stopped by {cause} at step {self.step} of {self.total_steps}, {saved}; the same "
            "command resumes"
        )
        self.data.close()
        if by_hand:
            raise SystemExit(130)

    # steps that are not finite

    def _check_finite(self) -> None:
        """Read the metrics, and handle nonfinite steps before they can reach a checkpoint.

        Raises:
            UserError: as train.on_nonfinite says.
        """
        bad = self.metrics.reduce()
        skip = self.config.train.on_nonfinite == "skip"
        path_of = self.data.loader.corrupt.dataset.path
        for one in bad if skip else bad[:1]:  # otherwise the others follow from it
            paths = [path_of(index) for index in one.indices.tolist()]
            event = {"step": one.step, "what": one.description, "skipped": skip, "paths": paths}
            self.logger.emit("nonfinite", **event)
        if bad and (not skip or self.metrics.consecutive_nonfinite >= MAX_CONSECUTIVE_NONFINITE):
            self._stop_nonfinite(bad[0].step, bad[0].description)

    def _stop_nonfinite(self, step: int, what: str) -> NoReturn:
        raise UserError(
            f"{what} at step {step}: take a smaller --optim.lr (it is {self.config.optim.lr:g}), "
            "or a warm-up by --optim.schedule.warmup_epochs 1; the last checkpoint is intact",
            on_all_ranks=True,
        )

    # what is logged

    def _log(self, event: str, **values: Any) -> None:
        self.logger.emit(event, step=self.step, epoch=self.step / self.steps_per_epoch, **values)

    def _log_step(self) -> None:
        """A line of the records: the steps since the last one."""
        self._log_corrupt_images(self.data.loader)
        self._check_finite()
        self.checkpoints.wait(block=False)
        epoch = (self.step - 1) / self.steps_per_epoch
        lrs = set_lr(self.state.optimizer, self.state.schedule, epoch)
        steps = len(self.metrics.losses)
        loss, error = self.metrics.pop_averages()
        seconds, data_seconds, timed_steps = self.timer.pop_times()
        seconds = max(seconds, 1e-9)
        self._log(
            "train",
            loss=loss,
            top1_error=error,
            lr=lrs["weights"],
            lrs=lrs,
            pca_noise_std=self.data.plan.pca_noise_std(epoch),
            steps=steps,
            images_per_second=timed_steps * self.config.data.batch_size / seconds,
            data_time_fraction=data_seconds / seconds,
            comm_time_fraction=self.layout.comm_timer.pop_seconds() / seconds,
            seconds=seconds,
        )

    def _log_epoch(self) -> None:
        """What the epoch so far was made of."""
        self._log_corrupt_images(self.data.loader)
        metrics = self.metrics
        self._log(
            "epoch",
            images=metrics.epoch_images,
            sample_order_hash=metrics.sample_order_hash,
            loss=metrics.epoch_loss / max(metrics.epoch_steps, 1),
            top1_error=100.0 * (1 - metrics.epoch_num_correct / max(metrics.epoch_images, 1)),
        )

    def _log_corrupt_images(self, loader: Loader) -> int:
        """Log the images that any rank's loader substituted or skipped; how many."""
        mine = loader.corrupt.pop_events() if self.mesh.is_replica_leader else []
        events = [event for each in self.mesh.all_gather_object(mine) for event in each]
        for event in events:
            self.logger.emit("corrupt_image", step=self.step, **event)
        return len(events)

    def _log_start(self) -> None:
        mesh, info = self.mesh, self.data.info
        values = {
            "world_size": mesh.world_size,
            "device": device_name(mesh.device),
            "precision": self.layout.precision,
            "compiled": setup.is_compiled(self.config, mesh),
            "cuda_graph": setup.uses_cuda_graph(self.config, mesh),
            "threads": mesh.threads,
            "loader": self.data.loader.description,
            "layout": self.layout.description,
            "parameters": self.layout.num_parameters,
            "num_classes": len(info.train.classes),
            "train_images": len(info.train),
            "val_images": len(info.val),
            "dataset_hash": info.dataset_hash,
            "versions": setup.VERSIONS,
            "restarts": restart_info(),
        }
        self.logger.print(start_message(self.config.model.arch, values, self.path))
        config = to_dict(self.config)
        if self.resumed_config is None:
            self._log("start", config=config, **values)
        else:
            self._log("resume", changed=diff_configs(self.resumed_config, config), **values)
        for message in self.warnings:
            self._log("warning", message=message)

    def _log_first_batch(self, batch: Batch) -> None:
        """What the network really sees, as a picture."""
        if self.logger.is_active:
            noise = self.data.plan.pca_noise_std(0)
            pixels = self.data.normalization.to_uint8_images(batch.images[:32], noise)
            self.logger.log_labeled_images(pixels, batch.labels[:32], self.data.info.short_names)

    def _log_predictions(self) -> None:
        """A few validation images with their best labels; all ranks call it together."""
        info, eval_batch = self.data.info, self.config.data.eval_batch_size
        count = min(16, len(info.val), max(eval_batch // self.mesh.dp_size, 1))
        samples = self.data.eval_plan.samples(np.linspace(0, len(info.val) - 1, count, dtype=int))
        (batch,) = self.data.eval_loader.batches([samples])
        probs = self.layout.logits(batch.images).softmax(1)
        pixels = self.data.eval_normalization.to_uint8_images(batch.images)
        self.logger.log_predictions(self.step, pixels, batch.labels, probs, info.short_names)

    def _log_kernels(self) -> None:
        first = next(t for t in self.checkpoints.state_tensors().values() if t.dim() == 4)
        kernels = first.full_tensor() if isinstance(first, DTensor) else first
        towers = MODEL_REGISTRY[self.config.model.arch].towers
        self.logger.log_kernels(self.step, kernels.float().cpu().numpy(), towers)

    def _finish(self, result: dict[str, float]) -> None:
        ended = self.step >= self.total_steps
        self._log_predictions()
        self._log_kernels()
        self.logger.plot_curves(self.step)
        self._log("finished", ended=ended, **result, best=self.checkpoints.best)
        self.logger.close("ended" if ended else "stopped", self.step)
        self.data.close()
        stopped_at = "" if ended else f"step {self.step} of {self.total_steps}"
        hint = QUICKSTART_HINT if Path(self.data.info.train.folder).parent.name == DIGITS else ""
        self.logger.print(end_message(result, self.path, stopped_at=stopped_at, hint=hint))

    def _report_nothing_to_do(self) -> None:
        self.logger.close("ended" if self.step >= self.total_steps else "stopped", self.step)
        self.logger.print(
            f"{self.path} is at step {self.step} already, and was asked for {self.last_step}: "
            "raise --train.max_steps or --train.epochs, or start another run by --run.resume never"
        )

    def _check_ranks_agree(self) -> None:
        """See that all ranks were given the same run, and that they share each batch out exactly.

        Raises:
            UserError: they were not, or do not.
        """
        mine = (to_dict(self.config), self.data.info.dataset_hash, self.step)
        batch, mesh = self.config.data.batch_size, self.mesh
        positions = range(batch)[mesh.batch_slice] if mesh.is_replica_leader else range(0)
        ranks = mesh.all_gather_object((mine, positions))
        covered = sorted(position for _, positions in ranks for position in positions)
        if any(other != mine for other, _ in ranks) or covered != list(range(batch)):
            raise UserError(
                "the processes of this run were started with different options, or do not all "
                "reach the same run folder: give every machine the same command line",
                on_all_ranks=True,
            )


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    parser = CommandParser("train", __doc__, default_config="quickstart")
    parsed = parser.parse(arguments)
    _, kept = _find_run(parsed)  # by every rank, before any of them writes
    config = parser.parse(arguments, kept).config if kept else parsed.config
    runtime = config.runtime
    mesh = init_distributed(runtime.device, runtime.threads, runtime.hang_timeout)
    setup.validate(config, mesh)
    run_dirs: list[RunDir] = []

    def open_run() -> Path:
        run_dirs.append(RunDir(_find_run(parsed)[0]))
        run_dirs[0].lock()
        run_dirs[0].set_status("running")
        return run_dirs[0].path

    path = mesh.broadcast_from_rank0(open_run)
    try:
        mesh = mesh.with_layout(config.parallel.towers)
        Trainer(config, mesh, run_dirs[0] if run_dirs else None, path).train()
    except UserError as error:  # a person has to fix it: a restart would not help
        if run_dirs or not error.on_all_ranks:
            RunDir(path).set_status("failed")
        raise


def _find_run(parsed: ParsedArgs) -> tuple[Path, dict[str, Any]]:
    """The run's folder, and the options that it keeps if the run resumes there."""
    run = parsed.config.run
    try:
        path, resumes = resolve_run_dir(run.output_dir, run.name or parsed.config_name, run.resume)
        return path, read_config(path) if resumes else {}
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from None


if __name__ == "__main__":
    run_command(main)
