"""Train AlexNet, alone or as one of the processes that torchrun starts.

torchrun --nproc_per_node=2 -m alexnet_dist.train --config configs/imagenette.yaml --data.root DIR
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.tensor import DTensor

from alexnet_dist import setup
from alexnet_dist.config import (
    CommandParser,
    Config,
    check_resume_compatible,
    diff_configs,
    to_dict,
)
from alexnet_dist.data.loader import Batch, Loader
from alexnet_dist.errors import UserError, end_launcher, refuse, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel.hang_detector import HangDetector
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.tracking import plots, run_dir
from alexnet_dist.tracking.logger import Logger
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.evaluation import EvalMetrics, count_skipped
from alexnet_dist.training.preemption import Preempted, PreemptionHandler, StopReason
from alexnet_dist.training.step import StepThrottle, StepTimer, TrainMetrics, lrs_at, set_lr

# after so many steps without a finite loss and gradient, more of them will not help
MAX_CONSECUTIVE_NONFINITE = 10


class Trainer:
    """A training run: what it is made of, and how far it is.

    Attributes:
        path: the run's folder, which rank 0 has locked.
        step, last_eval_step: the step reached, and the one after which was evaluated last.
        last_step: where this attempt ends, at train.max_steps or where the run does.
    """

    def __init__(self, config: Config, mesh: Mesh, path: Path) -> None:
        self.config, self.mesh, self.path = config, mesh, path
        self.data = setup.build_data(config, mesh)
        self.training = setup.build_training(config, mesh, self.data)
        self.layout = self.training.layout
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
            self.training.optimizer,
            emit=lambda event, **values: self.logger.emit(event, **values),
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
        )
        resumed_config, warnings = self._restore_or_initialize()
        self.logger = Logger(
            path if mesh.rank == 0 else None,
            to_dict(config),
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        self._log_start(resumed_config, warnings)

    def train(self) -> None:
        """Train to the end of the run, or to train.max_steps of it, or until told to stop.

        Raises:
            UserError: something that a person has to fix.
            SystemExit: it was stopped by Ctrl-C, and is saved.
        """
        if self.last_eval_step >= max(self.step, self.last_step):
            message = (
                f"{self.path} has no step left to train: raise --train.max_steps or "
                "--train.epochs, or start another run by --run.resume never"
            )
            self.logger.emit("warning", self.step, message=message)
            self.logger.close("ended" if self.step >= self.total_steps else "stopped", self.step)
            return
        run = self.config.run
        self.hang_detector = HangDetector(self.mesh, self.config.runtime.hang_timeout)
        self.preemption = PreemptionHandler(
            self.path,
            self.mesh.long_timeout_group,
            signals=tuple(run.preempt_signals),
            time_limit=run.time_limit,
            grace=run.sigterm_grace,
            before_exit=self.logger.stop_progress_bar,
        )
        try:
            self.layout.warm_up(self.config.data.image_size)
            while self.last_eval_step < max(self.step, self.last_step):  # which is evaluated, too
                self._train_epoch()
                result = self._evaluate_and_save()
            self.checkpoints.wait()
            self.preemption.close()
            self.hang_detector.close()  # plots may take long
            self._finish(result)
        except Preempted as stop:
            self._save_and_exit(stop.reason)
        finally:
            self.hang_detector.close()
            self.logger.stop_progress_bar()

    def _train_epoch(self) -> None:
        """Steps to this epoch's end or the last step; none if only an evaluation is missing."""
        config, plan, training = self.config, self.data.plan, self.training
        # of the last evaluation: a run may have stopped between an epoch's last step and its own
        epoch = max(self.last_eval_step, 0) // self.steps_per_epoch
        first, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        end = min(end, self.last_step)
        samples = plan.epoch(epoch, self.step - first, self.mesh.batch_slice)
        with contextlib.closing(self.data.loader.batches(samples)) as batches:
            self.timer.start()
            while self.step < end:
                self.hang_detector.heartbeat(f"waiting for the images of step {self.step + 1}")
                batch = next(batches)
                self.timer.mark_data_ready()
                if self.step == 0:
                    self._plot_first_batch(batch)

                self.hang_detector.heartbeat(f"computing step {self.step + 1}")
                set_lr(training.optimizer, training.schedule, self.step / self.steps_per_epoch)
                masks = self.layout.dropout_masks(config.train.seed, self.step)
                result = training.train_step(batch.images, batch.labels, masks)
                self.throttle.step_launched(batch)
                self.step += 1
                self.metrics.add(self.step, result, batch.indices)
                self.timer.mark_step_done()

                if self.step % config.train.log_interval == 0:
                    self._log_steps()
                interval = config.checkpoint.interval_steps
                if interval and self.step % interval == 0 and self.step < end:
                    self._save()
                self._check_stop(self.timer)
        if self.metrics.has_unlogged_steps:
            self._log_steps()

    def _evaluate_and_save(self) -> dict[str, float]:
        """Log exact errors over the validation images, end the epoch if it is complete (schedule,
        metrics, whether it is the best), and begin to write a checkpoint."""
        timer, counts = StepTimer(), EvalMetrics(self.mesh.device)
        loader, samples = self.data.eval_loader, self.data.eval_plan.batches(self.mesh.batch_slice)
        with contextlib.closing(loader.batches(samples)) as batches:
            for batch in batches:
                counts.update(self.layout.eval_counts(batch.images, batch.labels))
                timer.mark_step_done()
                self.hang_detector.heartbeat(f"evaluating after step {self.step}")
                self._check_stop(timer)
        result = counts.compute()
        skipped = self._log_corrupt_images(loader)
        result = count_skipped(result, skipped, len(self.data.info.val))
        self.logger.emit("eval", self.step, **result, seconds=timer.pop_times()[0])
        self.logger.emit(
            "epoch",
            self.step,
            images=self.metrics.epoch_images,
            sample_order_hash=self.metrics.sample_order_hash,
            **self.metrics.epoch.averages(self.config.data.batch_size),
        )
        self.last_eval_step, is_best = self.step, False
        if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
            self.training.schedule.step_metric(result["top1_error"])
            self.metrics.next_epoch()
            self.checkpoints.wait()  # if the best one is lost, the one before it counts
            best = self.checkpoints.best
            is_best = best is None or result["top1_error"] < best["top1_error"]
        self._save(best={**result, "step": self.step} if is_best else None)
        return result

    def _check_stop(self, timer: StepTimer) -> None:
        """Stop here if told to, or if the time left is for no more than a step and a save."""
        need = 2 * timer.longest_step + 2 * self.checkpoints.longest_save
        self.preemption.check_stop(need, need if self.checkpoints.longest_save else None)

    # checkpoints

    def _save(self, best: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint of this step; ``best`` is its evaluation, if the best."""
        self.hang_detector.heartbeat(f"saving step {self.step}")
        self._check_finite(weights=True)
        info = self.data.info
        state = {
            "run": self.path.name,
            "step": self.step,
            "last_eval_step": self.last_eval_step,
            "schedule": self.training.schedule.state_dict(),
            "metrics": self.metrics.state_dict(),
            "scaler": self.layout.scaler.state_dict() if self.layout.scaler else {},
            "config": to_dict(self.config),
            "classes": info.train.classes,
            "statistics": info.stats.to_json(),
            "dataset_hash": info.dataset_hash,
            "images": {"train": len(info.train), "val": len(info.val)},
            "versions": setup.VERSIONS,
        }
        self.checkpoints.save(state, best)
        self.timer.start()

    def _restore_or_initialize(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Resume from the newest valid checkpoint, or initialize the weights.

        Returns:
            The config of the attempt before, None at the beginning; and warnings to be logged.
        """
        saved, warnings = self.checkpoints.restore(self._check_resumable)
        if saved is not None:
            self.step, self.last_eval_step = saved["step"], saved["last_eval_step"]
            self.training.schedule.load_state_dict(saved["schedule"])
            self.metrics.load_state_dict(saved["metrics"])
            if saved["scaler"] and self.layout.scaler:  # as far as fp16 is used, and was
                self.layout.scaler.load_state_dict(saved["scaler"])
            return saved["config"], warnings
        setup.init_weights(self.config, self.layout, len(self.data.info.train.classes))
        path, same = self.config.model.pretrained, partial(setup.same_classes, self.data.info)
        if path and (missing := ", ".join(self.checkpoints.load_pretrained(path, same))):
            warnings.append(f"{path} has no {missing} for these classes: initialized from scratch")
        return None, warnings

    def _check_resumable(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of a run with other images or a config that means another run."""
        alternative = (
            f"the run in {self.path} has trained for {saved['step']} steps with it; start another "
            "run by --run.name NAME or --run.resume never"
        )
        check_resume_compatible(saved["config"], to_dict(self.config), alternative)
        info = self.data.info
        problem = f"the images below {info.train.folder} are not those of before: {alternative}"
        refuse({problem: saved["dataset_hash"] != info.dataset_hash})

    def _check_finite(self, *, weights: bool = False) -> None:
        """Read the metrics, and log steps that were not finite; before they reach a checkpoint.

        Args:
            weights: check these, too: the last losses were finite, maybe not the update after them.

        Raises:
            UserError: training cannot go on, as train.on_nonfinite says.
        """
        bad, skip = self.metrics.reduce(), self.config.train.on_nonfinite == "skip"
        path_of = self.data.loader.corrupt.dataset.path
        for each in bad if skip else bad[:1]:  # otherwise the others follow from it
            values = {"what": each.problem, "skipped": skip}
            paths = [path_of(index) for index in each.indices.tolist()]
            self.logger.emit("nonfinite", each.step, **values, paths=paths)
        problem = ""
        if bad and (not skip or self.metrics.consecutive_nonfinite >= MAX_CONSECUTIVE_NONFINITE):
            problem = f"{bad[0].problem} at step {bad[0].step}"
        elif weights and not self.checkpoints.weights_finite():
            problem = f"a weight is not finite at step {self.step}"
        fix = (
            f"take a smaller --optim.lr (it is {self.config.optim.lr:g}), or a warm-up by "
            "--optim.schedule.warmup_epochs 1; the last checkpoint is intact"
        )
        refuse({f"{problem}: {fix}": bool(problem)})

    # what is logged

    def _log_start(self, resumed_config: dict[str, Any] | None, warnings: list[str]) -> None:
        mesh, info = self.mesh, self.data.info
        config = to_dict(self.config)
        values: dict[str, Any] = {
            "arch": self.config.model.arch,
            "world_size": mesh.world_size,
            "device": device_name(mesh.device),
            "precision": self.layout.precision,
            "compiled": setup.layout_config(self.config, mesh).compile,
            "cuda_graph": setup.uses_cuda_graph(self.config, mesh),
            "threads": mesh.threads,
            "loader": self.data.loader.description,
            "layout": self.layout.description,
            "parameters": self.layout.num_parameters,
            "num_classes": len(info.train.classes),
            "train_images": len(info.train),
            "val_images": len(info.val),
            "left_out": info.left_out,
            "versions": setup.VERSIONS,
            "restarts": run_dir.restart_info(),
        }
        if resumed_config is None:
            self.logger.emit("start", self.step, config=config, **values)
        else:
            changed = diff_configs(resumed_config, config)
            self.logger.emit("resume", self.step, changed=changed, **values)
        for message in [*info.warnings, *warnings]:
            self.logger.emit("warning", self.step, message=message)

    def _log_steps(self) -> None:
        """A line of the records: the steps since the last one."""
        self._log_corrupt_images(self.data.loader)
        self._check_finite()
        self.checkpoints.wait(block=False)
        epochs = (self.step - 1) / self.steps_per_epoch
        interval = self.metrics.pop_interval()
        seconds, data_seconds, timed_steps = self.timer.pop_times()
        seconds = max(seconds, 1e-9)
        self.logger.emit(
            "train",
            self.step,
            **interval.averages(self.config.data.batch_size),
            lrs=lrs_at(self.training.optimizer, self.training.schedule, epochs),
            pca_noise_std=self.data.plan.pca_noise_std(epochs),
            steps=interval.steps,
            images_per_second=timed_steps * self.config.data.batch_size / seconds,
            data_time_fraction=data_seconds / seconds,
            comm_time_fraction=self.layout.comm_timer.pop_seconds() / seconds,
            seconds=seconds,
        )

    def _log_corrupt_images(self, loader: Loader) -> int:
        """Log the images that any rank's loader substituted or skipped; how many."""
        mine = loader.corrupt.pop_events() if self.mesh.is_replica_leader else []
        events = [event for each in self.mesh.all_gather_object(mine) for event in each]
        for event in events:
            self.logger.emit("corrupt_image", self.step, **event)
        return len(events)

    def _plot_first_batch(self, batch: Batch) -> None:
        """What the network really sees."""
        noise, names = self.data.plan.pca_noise_std(0), self.data.info.short_names
        pixels = self.data.loader.normalization.to_uint8_images(batch.images[:32], noise)
        captions = [names[label] for label in batch.labels[:32].tolist()]
        title = "the first training batch, as the network sees it"
        self.logger.plot("first_batch", 0, plots.plot_image_grid, pixels, captions, title)

    def _plot_results(self) -> None:
        """Validation images with their best labels, kernels, curves; all ranks call it together."""
        info, names, step = self.data.info, self.data.info.short_names, self.step
        most = max(self.config.data.eval_batch_size // self.mesh.dp_size, 1)
        count = min(16, len(info.val), most)
        samples = self.data.eval_plan.samples(np.linspace(0, len(info.val) - 1, count, dtype=int))
        (batch,) = self.data.eval_loader.batches([samples])
        probs = self.layout.logits(batch.images).softmax(1)
        pixels = self.data.eval_loader.normalization.to_uint8_images(batch.images)
        captions = [names[label] for label in batch.labels.tolist()]
        best = plots.top_labels(probs, names)
        self.logger.plot("predictions", step, plots.plot_predictions, pixels, captions, best, "", 8)
        first = next(t for t in self.checkpoints.state_tensors().values() if t.dim() == 4)
        kernels = (first.full_tensor() if isinstance(first, DTensor) else first).float().cpu()
        towers = MODEL_REGISTRY[self.config.model.arch].towers
        title = f"first-layer kernels after {step} steps"
        self.logger.plot("kernels", step, plots.plot_kernels, kernels.numpy(), towers, title)
        self.logger.plot_curves(step)

    # the end

    def _finish(self, result: dict[str, float]) -> None:
        ended = self.step >= self.total_steps
        self._plot_results()
        self.logger.emit("finished", self.step, ended=ended, **result, best=self.checkpoints.best)
        self.logger.close("ended" if ended else "stopped", self.step)
        self.data.close()
        if self.config.data.root == "digits" and self.mesh.rank == 0:
            print(
                "next: --config configs/imagenette.yaml (Imagenette), configs/paper2012.yaml\n"
                "(ImageNet) or none (CIFAR-10), with --data.root DIR"
            )

    def _save_and_exit(self, cause: StopReason) -> None:
        """Save, and end before the run does, to be resumed."""
        here, by_hand = (self.step, self.last_eval_step), cause == StopReason.INTERRUPT
        self.checkpoints.wait()
        if self.checkpoints.last_saved != here:
            self._save()
            self.checkpoints.wait()
        saved = self.checkpoints.last_saved == here
        self.logger.emit("preempted", self.step, cause=str(cause), saved=saved)
        self.logger.close("stopped" if by_hand else "preempted", self.step, wandb_timeout=5)
        self.data.close()
        if cause >= StopReason.SIGNAL:
            end_launcher()
        if by_hand:
            raise SystemExit(130)


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    parser = CommandParser("train", __doc__)
    parsed = parser.parse(arguments)
    run = parsed.config.run
    path, saved = run_dir.resolve_run_dir(run.output_dir, run.name, parsed.config_name, run.resume)
    config = parser.parse(arguments, saved).config if saved else parsed.config
    runtime = config.runtime
    mesh = init_distributed(runtime.device, runtime.threads, runtime.hang_timeout)
    setup.validate(config, mesh)
    mine = (path, saved, to_dict(config))
    problem = (
        "the processes of this run were started with different options, or do not all reach the "
        "same run folder: give every machine the same command line"
    )
    refuse({problem: any(other != mine for other in mesh.all_gather_object(mine))})
    mesh.broadcast_from_rank0(lambda: run_dir.lock(path))
    try:
        Trainer(config, mesh.with_layout(config.parallel.towers), path).train()
    except UserError as error:  # a person has to fix it: a restart would not help
        if mesh.rank == 0 or not error.on_all_ranks:
            run_dir.set_status(path, "failed")
        raise


if __name__ == "__main__":
    run_command(main)
