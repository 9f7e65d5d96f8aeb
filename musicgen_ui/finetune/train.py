"""The training: cross-entropy of a song's codes in the delay pattern, by AdamW on a LoRA.

What a step draws (examples, dropped prompts, dropout) follows from the seed and the step's number
alone. So a run that is resumed goes on exactly as if it had never ended.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from musicgen_ui import files
from musicgen_ui.engine.delay_pattern import delayed
from musicgen_ui.engine.transformer import LanguageModel
from musicgen_ui.errors import RequestError
from musicgen_ui.finetune.adapter import Adapter
from musicgen_ui.finetune.examples import Example, Examples

PROMPT_DROPOUT = 0.1  # of the examples learn without words, for guidance
WARM_UP = 0.1  # of the steps, at most 50 of them
LAST_RATE = 0.1  # of the learning rate, at the end
MAX_NORM = 1.0  # of the gradient
STATE = "state.pt"


class DivergedError(RequestError):
    """The loss or its gradient became NaN or infinite."""


@dataclass(frozen=True)
class Schedule:
    """What a run's steps are made of."""

    steps: int
    batch: int  # examples a step
    learning_rate: float
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step: a warm-up, then half a cosine."""
        warm_up = max(1, min(50, round(WARM_UP * self.steps)))
        rise = min(1.0, (step + 1) / warm_up)
        share = max(0.0, (step - warm_up) / max(1, self.steps - warm_up))
        fall = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, share))) / 2
        return self.learning_rate * rise * fall


class Trainer:
    """A decoder with an adapter that learns.

    Args:
        decoder: transformers', on its device; it gets the adapter's layers.
        examples: what to learn.
        schedule: the steps.
        rank: of the adapter.
    """

    def __init__(
        self, decoder: LanguageModel, examples: Examples, schedule: Schedule, rank: int
    ) -> None:
        self.decoder, self.examples, self.schedule = decoder, examples, schedule
        self.device = torch.device(decoder.device)
        self.adapter = Adapter(decoder, rank, schedule.seed)
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters, schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = 0
        self.rows = schedule.batch  # examples that are computed at once; see `estimate`
        decoder.train()

    def use_checkpointing(self) -> None:
        """Computes activations a second time instead of keeping them."""
        decoder: PreTrainedModel = self.decoder
        decoder.gradient_checkpointing_enable({"use_reentrant": False})

    def update(self) -> float:
        """Makes one step and returns its loss, in nats.

        Raises:
            DivergedError: the loss or the gradient is NaN or infinite; the weights are as before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad()
        loss = self.accumulate(self.batch(self.step), self.step)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters, MAX_NORM)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise DivergedError(f"The loss became NaN or infinite at step {self.step + 1}")
        self.optimizer.step()
        self.step += 1
        return loss

    def batch(self, step: int) -> list[Example]:
        """The examples of a step: every one once, in random order, then all again."""
        count, batch = len(self.examples.pieces), self.schedule.batch
        places = [divmod(step * batch + i, count) for i in range(batch)]
        orders = {
            epoch: random.Random(f"{self.schedule.seed} {epoch}").sample(range(count), count)
            for epoch, _ in places
        }
        return [self.examples.pieces[orders[epoch][at]] for epoch, at in places]

    def accumulate(self, batch: Sequence[Example], step: int) -> float:
        """Adds the gradient of a batch's mean loss, `rows` examples at a time; returns the loss."""
        draws = random.Random(f"{self.schedule.seed} step {step}")
        states = [self._condition(example, draws) for example in batch]
        codes = sum(example.codes.numel() for example in batch)
        devices = [self.device] if self.device.type == "cuda" else []
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices):
            torch.manual_seed(draws.randrange(2**31))
            for start in range(0, len(batch), self.rows):
                rows = slice(start, start + self.rows)
                loss = self.summed_loss(batch[rows], states[rows]) / codes
                torch.autograd.backward(loss)
                total += loss.detach()
        return float(total)

    def _condition(self, example: Example, draws: random.Random) -> Tensor:
        if draws.random() < PROMPT_DROPOUT:
            return self.examples.null
        return draws.choice(example.states)

    def summed_loss(self, batch: Sequence[Example], states: Sequence[Tensor]) -> Tensor:
        """The sum over all codes of the cross-entropy in nats."""
        config = self.decoder.config
        start_token, channels = config.pad_token_id, config.audio_channels
        assert start_token is not None
        columns = [delayed(e.codes.long(), e.codes.shape[1], channels, start_token) for e in batch]
        longest = max(each.shape[1] for each in columns)
        padded = [F.pad(each, (0, longest - each.shape[1]), value=start_token) for each in columns]
        stacked = torch.stack(padded).to(self.device)  # [batch, codebooks, columns]
        targets = stacked[..., 1:]
        logits = self.logits(stacked[..., :-1], states)[:, :, -targets.shape[-1] :]
        return F.cross_entropy(
            logits.flatten(0, 2).float(),
            targets.flatten(),
            ignore_index=start_token,
            reduction="sum",
        )

    def logits(self, columns: Tensor, states: Sequence[Tensor]) -> Tensor:
        """[batch, codebooks, columns] to [batch, codebooks, columns, codes], after those of a
        prefix where the checkpoint has one."""
        longest = max(len(each) for each in states)
        padded = [F.pad(each, (0, 0, 0, longest - len(each))) for each in states]
        mask = None
        if not self.examples.prefix:  # where zeros count as positions
            lengths = torch.tensor([len(each) for each in states], device=self.device)
            mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        weight = self.decoder.lm_heads[0].get_parameter("weight")
        result = self.decoder(
            input_ids=columns.flatten(0, 1),
            encoder_hidden_states=torch.stack(padded).to(self.device, weight.dtype),
            encoder_attention_mask=mask,
            use_cache=False,
        )
        logits: Tensor = result.logits.unflatten(0, columns.shape[:2])
        return logits

    def save_state(self, folder: Path) -> None:
        """Writes what `resume` needs.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        state = {
            "step": self.step,
            "adapter": self.adapter.state(),
            "optimizer": self.optimizer.state_dict(),
        }
        content = io.BytesIO()  # torch's own error of a full disk is not an OSError
        torch.save(state, content)
        files.replace(folder / STATE, content.getvalue())

    def resume(self, folder: Path) -> bool:
        """Goes on from what `save_state` wrote, if it did.

        Raises:
            RequestError: it cannot be read, or is of another adapter.
        """
        path = folder / STATE
        if not path.is_file():
            return False
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.adapter.load(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        except Exception as error:
            raise RequestError(
                f"{path} is damaged or of another run: name another folder for this run."
            ) from error
        return True
