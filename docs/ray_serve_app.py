"""Replicas behind one OpenAI API, by Ray Serve LLM, that draft with selfspec.

From this folder:

    serve run ray_serve_app:build model=MODEL           # a GPU for each replica
    serve run ray_serve_app:build model=MODEL cpus=1    # a core for each
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

CPU_KV_CACHE_BYTES = 1 << 30


class Args(BaseModel):
    """What `serve run` may be given as key=value.

    Attributes:
        model: Its name at Hugging Face, or a folder.
        num_replicas: Engines that share the requests.
        cpus: Cores of a replica where there are no GPUs; 0 where there are.
        speculative_config: vLLM's.
        engine_kwargs: More of vLLM's engine arguments.
        env_vars: More of the environment of the replicas.
    """

    model: str
    num_replicas: int = 2
    cpus: int = 0
    speculative_config: dict[str, Any] = {"method": "selfspec"}
    engine_kwargs: dict[str, Any] = {}
    env_vars: dict[str, str] = {}


def build(args: Args) -> Application:
    """The app, whose model is called `default`."""
    path = Path(args.model)
    source = str(path.absolute()) if path.exists() else args.model
    config = LLMConfig(
        model_loading_config={"model_id": "default", "model_source": source},
        engine_kwargs={
            "speculative_config": args.speculative_config,
            # Or each replica on a machine would claim nearly all of its memory.
            **({"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} if args.cpus else {}),
            **args.engine_kwargs,
        },
        deployment_config={
            "num_replicas": args.num_replicas,
            # What a replica takes is in its placement group; its actor would add one.
            "ray_actor_options": {"num_cpus": 0},
        },
        # Shows selfspec's own metrics beside vLLM's.
        callback_config={
            "callback_class": "vllm_selfspec.engine.ray_metrics:RayMetrics"
        },
        **(_on_cpus(args) if args.cpus else _on_gpus(args)),
    )
    return build_openai_app(
        {
            "llm_configs": [config],
            "ingress_cls_config": {"ingress_cls": Ingress},
            # It only passes requests on; by default it takes a core of two.
            "ingress_deployment_config": {
                "num_replicas": 1,
                "ray_actor_options": {"num_cpus": 0},
            },
        }
    )


def _on_gpus(args: Args) -> dict[str, Any]:
    return {"runtime_env": {"env_vars": args.env_vars}}


def _on_cpus(args: Args) -> dict[str, Any]:
    """Unless told, each replica's threads would be bound to the same cores."""
    threads = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.cpus),
    }
    return {
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundles": [{"CPU": args.cpus}]},
        "runtime_env": {"env_vars": {**threads, **args.env_vars}},
    }


class Ingress(OpenAiIngress):
    """Ray's, but a stream whose replica died ends with an error. Ray's own ends it as
    if it were whole, and only the missing `finish_reason` tells."""

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Called for /v1/completions."""
        return _telling_of_death(await super().completions(body, request))

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Called for /v1/chat/completions."""
        return _telling_of_death(await super().chat(body, request))


def _telling_of_death(response: Response) -> Response:
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_last_words(response.body_iterator)
    return response


async def _with_last_words(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    try:
        async for event in events:
            yield event
    except RayActorError:
        error = {
            "message": "the replica died that generated this text: send the request "
            "again, and another one answers it",
            "type": "replica_died",
            "code": 503,
        }
        yield f"data: {json.dumps({'error': error})}\n\n"
