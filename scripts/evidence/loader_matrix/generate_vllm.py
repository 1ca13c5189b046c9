"""vLLM end to end on CPU: greedy generation of a few tokens, with the kernels replaced that quantize activations."""

from __future__ import annotations

from typing import Any

from engines import driver
from engines.driver import Job
from engines.trying import trying

PROMPT = list(range(10, 40))
TOKENS = 12


def start() -> str:
    """Import vLLM and replace the CUDA kernels that quantize weights while loading and activations while running."""
    import torch
    import vllm
    import vllm._custom_ops as ops

    # Missing from CPU builds; everything else runs as released.
    ops.scaled_fp8_quant = trying.scaled_fp8_quant
    torch.library.define("_C::silu_and_mul_quant", "(Tensor! result, Tensor input, Tensor scale) -> ()")
    torch.library.impl("_C::silu_and_mul_quant", "cpu", silu_and_mul_quant)
    return str(vllm.__version__)


def silu_and_mul_quant(result: Any, input: Any, scale: Any) -> None:  # noqa: A002 - the name that callers pass it by
    """Fill `result` (FP8, [..., d]) with silu(gate) x up of `input` ([..., 2 d]), quantized by `scale`."""
    from torch.nn.functional import silu

    gate, up = input.float().chunk(2, -1)
    result.copy_(trying.scaled_fp8_quant(silu(gate) * up, scale)[0])


def generate(job: Job) -> dict[str, Any]:
    """Tokens and their log-probabilities, for a fixed prompt of token ids."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(job.model),
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        language_model_only=True,
        disable_log_stats=True,
    )
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, detokenize=False)
    answer = model.generate([{"prompt_token_ids": PROMPT}], sampling)[0].outputs[0]
    logprobs = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
    return {"tokens": list(answer.token_ids), "logprobs": [round(each, 4) for each in logprobs]}


if __name__ == "__main__":
    driver.run(("vllm", "compressed_tensors", "transformers"), start, generate, lambda found, _: found)
