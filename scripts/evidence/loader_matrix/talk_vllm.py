"""vLLM end to end on CPU with the model that talks: log-probabilities of held-back text, and the text it writes.

From 0.32 on vLLM computes this model on CPU by itself. Up to 0.31 its Gated DeltaNet needs a card's kernels: here plain
torch takes their place, for whole prompts only, and text is written by asking for one more token of a longer prompt
each time. What reads, places, merges and multiplies weights is vLLM's own in both.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from engines import driver
from engines.driver import Job
from engines.trying import trying

from loader_matrix import generate_vllm

if TYPE_CHECKING:
    import torch

PROMPT = b"And God said unto "
TOKENS = 80
WINDOW, WINDOWS = 256, 32  # bytes of the held-back text that a prompt has, and how many prompts
BYTES = 256
SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 2 * WINDOW,
    "max_num_batched_tokens": 8 * WINDOW,
    "max_num_seqs": 4,
    "dtype": "bfloat16",
    "language_model_only": True,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
    "block_size": WINDOW,  # else 0.19.1 takes 128 on CPU, less than the state of a Gated DeltaNet needs
}
_OLD = "vllm.model_executor.layers.mamba.gdn_linear_attn"


def start() -> str:
    """Import vLLM, replace the kernels that a CPU lacks."""
    version = generate_vllm.start()
    trying.module("vllm.model_executor.models.registry")._run_in_subprocess = lambda ask: ask()
    _multiply_faster()
    with suppress(AttributeError):  # 0.19.1 has an emulation of its own, which the variable set there chooses
        trying.offer_fp4_kernel()
    if only_whole_prompts():
        _offer_operators()
        _compute_delta_rule_here()
    return version


def only_whole_prompts() -> bool:
    """Whether this vLLM is one that is computed by plain torch here."""
    return importlib.util.find_spec(_OLD) is not None


def _multiply_faster() -> None:
    """torch multiplies FP8 on a CPU one number after the other. The product of FP8 numbers is exact in F32."""
    import torch

    def scaled_mm(
        a: torch.Tensor, b: torch.Tensor, *, scale_a: Any, scale_b: Any, out_dtype: Any = None, bias: Any = None
    ) -> torch.Tensor:
        product: torch.Tensor = (a.float() @ b.float()) * scale_a * scale_b
        return (product if bias is None else product + bias).to(out_dtype)

    setattr(torch, "_scaled_mm", scaled_mm)  # noqa: B010 - another signature than the stock one's


def _offer_operators() -> None:
    """The extension modules of 0.19.1 are for another torch: those of 0.32 are there, which bind no threads to cores
    and take more arguments for attention."""
    import torch
    import vllm._custom_ops as ops

    torch.library.define("_C::init_cpu_threads_env", "(str cpus) -> str")
    torch.library.impl("_C::init_cpu_threads_env", "CompositeExplicitAutograd", lambda _: "")
    stock = torch.ops._C

    def metadata(**named: Any) -> Any:
        named["sliding_window_size"] = -1
        return stock.get_scheduler_metadata(*named.values(), None, "auto")

    def store(*given: Any) -> None:
        stock.cpu_attn_reshape_and_cache(*given, 1.0, 1.0, "auto")

    def attend(**named: Any) -> None:
        named["sliding_window"] = -1  # none of these models has one
        stock.cpu_attention_with_kv_cache(*named.values(), None, 1.0, 1.0, "auto")

    ops.cpu_attn_get_scheduler_metadata = metadata
    ops.cpu_attn_reshape_and_cache = store
    ops.cpu_attention_with_kv_cache = attend


def _compute_delta_rule_here() -> None:
    """In vLLM up to 0.19.1."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNetAttention
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    # Asks for a card's compute capability and takes weight-only Marlin where there is none.
    CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True
    GatedDeltaNetAttention._forward_core = _forward_core
    stock = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, *given: Any, **named: Any) -> None:
        if layer.weight.ndim == 2:  # it can't take the 3-D weight of the convolution
            stock(layer, *given, **named)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _forward_core(
    self: Any, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor
) -> None:
    """As vLLM's method of this name, for prompts that start in this step and end in it."""
    from vllm.forward_context import get_forward_context

    from loader_matrix.delta_rule import convolved, delta_rule, gates

    found = get_forward_context().attn_metadata
    if found is None:  # the run that measures memory
        return
    metadata = found[self.prefix]
    if metadata.num_decodes or bool(metadata.has_initial_state.any()):
        raise ValueError("only whole prompts are computed")
    starts = metadata.non_spec_query_start_loc.tolist()
    for begin, end in pairwise(starts):
        mixed = convolved(mixed_qkv[begin:end], self.conv1d.weight)
        q, k, v = (each[0] for each in self.rearrange_mixed_qkv(mixed))
        decay, beta = gates(a[begin:end], b[begin:end], self.A_log, self.dt_bias)
        core_attn_out[begin:end] = delta_rule(q, k, v, decay, beta).to(core_attn_out.dtype)


def talk(job: Job) -> dict[str, Any]:
    """Nats a byte, and what follows the prompt, by the likeliest byte each time."""
    from vllm import LLM

    model = LLM(model=str(job.model), skip_tokenizer_init=True, **SETTINGS)
    return {"nats": _nats(model, job.truth.parent / "held_back.txt"), "text": _written(model)}


def _nats(model: Any, path: Any) -> float:
    """Of every byte of each window but its first."""
    from vllm import SamplingParams

    held_back = list(path.read_bytes()[: WINDOW * WINDOWS])
    prompts = [{"prompt_token_ids": held_back[at : at + WINDOW]} for at in range(0, len(held_back), WINDOW)]
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    total = 0.0
    for answer in model.generate(prompts, sampling, use_tqdm=False):
        steps = list(zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True))[1:]
        total -= sum(step[token].logprob for token, step in steps)
    return round(total / (WINDOW - 1) / len(prompts), 4)


def _written(model: Any) -> str:
    from vllm import SamplingParams

    stepwise = only_whole_prompts()
    sampling = SamplingParams(
        max_tokens=1 if stepwise else TOKENS, temperature=0, detokenize=False, allowed_token_ids=list(range(BYTES))
    )
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + TOKENS:
        answer = model.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0].outputs[0]
        tokens += answer.token_ids
    return bytes(tokens[len(PROMPT) :]).decode("latin-1")


if __name__ == "__main__":
    driver.run(("vllm", "compressed_tensors", "transformers"), start, talk, lambda found, _: found)
