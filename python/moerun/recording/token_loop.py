"""Decodes with a model of transformers, token by token, and records the routing of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moerun.recording.engine import TraceOptions
from moerun.recording.routers import Watch
from moerun.recording.stack_reader import StackReader
from moerun.trace import SequenceRouting


def decode(
    run: Callable[..., Any],
    watch: Watch,
    reader: StackReader,
    prompt: torch.Tensor,
    inputs: dict[str, Any],
    options: TraceOptions,
    seed: int,
) -> SequenceRouting:
    """Return the routing of `options.generate` tokens after a prompt, which is not recorded.

    The token that ends a text does not end the decoding.

    Args:
        run: runs a model of transformers.
        watch: watches its routers.
        reader: reads those of the stack that decodes.
        prompt: (1, T) token ids.
        inputs: what else each step gets, such as what an encoder made of the text.
        options: how many tokens, and how they are chosen.
        seed: of the sampling.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed % 2**63)
    ids_name = "decoder_input_ids" if inputs else "input_ids"
    cache: Any = None
    so_far = step = prompt
    token_ids: list[int] = []
    predicted_ids: list[int] = []
    choices: list[list[Any]] = [[] for _ in reader.stack.moe_layers]
    for number in range(options.generate + 1):
        with watch:
            if cache is None:  # the prompt; or a model that keeps nothing between steps
                output = run(**{ids_name: so_far}, **inputs, use_cache=True)
            else:
                output = run(**{ids_name: step}, **inputs, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        seen = watch.clear()
        logits = output.logits[0, -1].float()
        if number > 0:
            predicted_ids.append(int(logits.argmax()))
            for layer, calls in zip(choices, reader.read(seen), strict=True):
                layer += [call.last() for call in calls[-1:]]
        if number < options.generate:
            if options.temperature > 0:
                chances = torch.softmax(logits / options.temperature, dim=-1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            else:
                token = int(logits.argmax())
            token_ids.append(token)
            step = torch.tensor([[token]], device=prompt.device)
            so_far = torch.cat([so_far, step], dim=1)
    return reader.routing(
        choices,
        np.array(token_ids, np.int32),
        np.array(predicted_ids, np.int32) if options.with_predictions else None,
        options,
    )
