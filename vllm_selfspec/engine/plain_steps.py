"""`PlainSteps`: steps without drafts, for requests that verification does not carry.

One rule: the drafts of a step are taken back before it is scheduled, or not at all. A
step without any is sampled as plain vLLM's, in either model runner, so what is asked
for is answered as plain vLLM answers it. Which requests these are says
`request_fields`.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_selfspec.draft.stats import DraftStats
from vllm_selfspec.engine.request_fields import needs_plain_steps


class OfScheduler:
    """To be mixed into one of vLLM's schedulers: what it then finds there."""

    vllm_config: Any
    log_stats: bool
    requests: dict[str, Request]
    running: list[Request]
    dynamic_sd_lookup: list[int] | None
    num_spec_tokens: int
    max_num_running_reqs: int


class PlainSteps(OfScheduler):
    """What every scheduler of an engine with selfspec gets; to be mixed into one of
    vLLM's.

    Attributes:
        undrafted: The statistics that count such requests and steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.undrafted = DraftStats(self.vllm_config)
        self._plain: set[str] = set()  # requests that need plain steps

    def add_request(self, request: Request) -> None:
        """vLLM's; notes what the request asks for."""
        is_v2 = self.vllm_config.use_v2_model_runner
        if needs_plain_steps(request.sampling_params, is_v2):
            # The turns of a streaming session come by the same name.
            self.undrafted.undrafted["requests"] += (
                request.request_id not in self._plain
            )
            self._plain.add(request.request_id)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's, without the drafts that verification would not be right for."""
        self._plain &= self.requests.keys()
        if self.log_stats:
            self.undrafted.publish("requests")
        if self._needs_plain_step():
            return self._schedule_plain_step(throttle_prefills)
        return super().schedule(throttle_prefills)  # type: ignore[misc]

    def _needs_plain_step(self) -> bool:
        """Whether a request that needs one runs, or may be admitted in this step."""
        if len(self.running) < self.max_num_running_reqs:
            # The next turn of a session comes when it comes.
            sleeping = RequestStatus.WAITING_FOR_STREAMING_REQ
            return any(self.requests[one].status != sleeping for one in self._plain)
        return any(request.request_id in self._plain for request in self.running)

    def _schedule_plain_step(self, throttle_prefills: bool) -> SchedulerOutput:
        """A step that verifies nothing, and after which nothing is drafted."""
        for request in self.running:
            request.spec_token_ids = []
        parallel_config = self.vllm_config.parallel_config
        # Data-parallel ranks that draft differently would wait for each other for ever.
        in_vain = self.num_spec_tokens if parallel_config.data_parallel_size > 1 else 0
        lookup = self.dynamic_sd_lookup
        # Where there is one vLLM does not fill new requests up with placeholders for
        # drafts, either.
        self.dynamic_sd_lookup = [in_vain] * (self.max_num_running_reqs + 1)
        try:
            output: SchedulerOutput = super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self.dynamic_sd_lookup = lookup
        self.undrafted.undrafted["steps"] += output.total_num_scheduled_tokens > 0
        return output
