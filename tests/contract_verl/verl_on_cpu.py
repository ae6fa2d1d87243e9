"""What verl 0.9 lacks to train on a CPU: a platform, and a rollout engine on transformers' `generate`. For tests alone.

Loaded in every process by `VERL_USE_EXTERNAL_MODULES=verl_on_cpu`; needs `VERL_PLATFORM=cpu`.
"""

import asyncio
import contextlib
import functools
import os
import types

import ray
import torch
import verl.utils.distributed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.workers.rollout import base, replica
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


def _device_module():
    """torch.cuda's functions that verl calls, for a machine without."""
    module = types.ModuleType("verl_on_cpu_device")
    zeros = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
    nothing = ("empty_cache", "synchronize", "set_device", "set_per_process_memory_fraction", "reset_peak_memory_stats",
               "ipc_collect", "manual_seed", "manual_seed_all", "current_stream")  # fmt: skip
    vars(module).update({name: lambda *_, **__: 0 for name in zeros})
    vars(module).update({name: lambda *_, **__: None for name in nothing})
    vars(module).update(
        is_available=lambda: False, mem_get_info=lambda *_: (1 << 34, 1 << 34), device_count=lambda: 1,
        current_device=lambda: torch.device("cpu"), get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state,
        get_device_name=lambda *_: "cpu",
        get_device_properties=lambda *_: types.SimpleNamespace(total_memory=1 << 34, name="cpu", major=0, minor=0),
    )  # fmt: skip
    return module


_DEVICE = _device_module()


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    device_name = vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _DEVICE)

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return os.environ.get("VERL_PLATFORM") == "cpu"

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return (None, None)

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # logical slots: ray.init(num_gpus=N) works without a GPU

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


# verl writes "cpu:gloo,{device}:{backend}", in which "cpu" would stand twice
verl.utils.distributed.initialize_global_process_group_ray = functools.partial(
    verl.utils.distributed.initialize_global_process_group_ray, backend="gloo"
)


@ray.remote(num_cpus=0)
class Server:
    """Tokens in, tokens and log-probs out; requests that arrive together are one batch."""

    def __init__(self, config, path):
        torch.set_num_threads(1)
        self.length = config.response_length
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.waiting, self.loaded, self.worker, self.step = [], asyncio.Event(), None, None

    async def update_weights(self, weights, global_steps=None):
        missing = self.model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
        assert all("lm_head" in name for name in missing.missing_keys)
        self.model.tie_weights()
        self.step = global_steps
        self.loaded.set()

    async def generate(self, request_id, prompt_ids, sampling_params, image_data=None, video_data=None, **_):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), sampling_params.get("temperature", 1.0), answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self):
        await self.loaded.wait()
        while self.waiting:
            await asyncio.sleep(0.05)
            batch, self.waiting = self.waiting, []
            for temperature in {t for _, t, _ in batch}:
                chosen = [item for item in batch if item[1] == temperature]
                for (_, _, answer), made in zip(
                    chosen, self._draw([p for p, _, _ in chosen], temperature), strict=True
                ):
                    answer.set_result(made)

    @torch.no_grad()
    def _draw(self, prompts, temperature):
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        )
        found = self.model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=self.length, eos_token_id=self.end, pad_token_id=self.pad,
            return_dict_in_generate=True, output_logits=True, **sampling,
        )  # fmt: skip
        drawn = found.sequences[:, width:]
        scores = (torch.stack(found.logits, 1).float() / (temperature or 1.0)).log_softmax(-1)
        logprobs = scores.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        ends = [s.index(self.end) + 1 if self.end in s else len(s) for s in drawn.tolist()]
        return [
            TokenOutput(token_ids=s[:n].tolist(), log_probs=p[:n].tolist(), stop_reason="completed",
                        extra_fields={"global_steps": self.step})
            for s, p, n in zip(drawn, logprobs, ends, strict=True)
        ]  # fmt: skip

    async def _nothing(self, **_):
        pass

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = (
        _nothing
    )


class Replica(RolloutReplica):
    async def launch_servers(self):
        self._server_address = f"cpu_server_{self.replica_rank}"
        self._server_handle = Server.options(name=self._server_address, max_concurrency=1000).remote(
            self.config, self.model_config.path
        )
        self.servers = [self._server_handle]


class Adapter(BaseRollout):
    """In the training worker: hands its weights to the server of its rank."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors", **_):
        copy = {name: w.detach().cpu().float().contiguous().clone() for name, w in weights}
        server = ray.get_actor(f"cpu_server_{os.environ.get('RANK', 0)}")
        await server.update_weights.remote(copy, global_steps=global_steps)


base._ROLLOUT_REGISTRY["cpu", "async"] = "verl_on_cpu.Adapter"
replica.RolloutReplicaRegistry.register("cpu", lambda: Replica)
