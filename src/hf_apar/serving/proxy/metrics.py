"""What the proxy counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest

from hf_apar.serving.answer import Answer


class ProxyMetrics:
    """The numbers of one proxy, in a registry of their own, by upstream."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"hf_apar_proxy_{name}", says, labels, registry=self.registry)

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(f"hf_apar_proxy_{name}", says, labels, registry=self.registry)

        self.answers = counter("answers", "Answers written in threads that ended, by how.", "upstream", "finish_reason")
        self.threads = counter("threads", "Threads of these answers.", "upstream")
        self.tokens = counter("tokens", "Tokens of these answers, without control tokens.", "upstream")
        self.steps = counter("steps", "Tokens on their longest paths: tokens / steps are the tokens of a step.", "upstream")
        self.plain = counter("plain_requests", "Requests that went upstream as they came.", "upstream")
        self.errors = counter(
            "upstream_errors", "Requests that an upstream failed, by the status told.", "upstream", "status"
        )
        self.refused = counter("refused", "Requests refused since too many answers were in flight.")
        self.live = gauge("threads_live", "Threads that write now.", "upstream")
        self.waiting = gauge("threads_waiting", "Threads that wait for their turn.", "upstream")
        self.in_flight = gauge("answers_in_flight", "Answers that are not finished, plain ones among them.")
        self.up = gauge("upstream_up", "Does the upstream take requests?", "upstream")

    def ended(self, upstream: str, answer: Answer) -> None:
        """Count a finished answer."""
        threads, prompt = answer.tree.threads, answer.row.prompt_length
        longest = max(len(one.path_ids) - prompt - (one.depth - 1) + (one.eos_token_id is not None) for one in threads)
        reason = answer.failure or ("length" if answer.finish_reason == "length" else "stop")
        self.answers.labels(upstream, reason).inc()
        self.threads.labels(upstream).inc(len(threads))
        self.tokens.labels(upstream).inc(sum(len(one.tokens) for one in threads))
        self.steps.labels(upstream).inc(max(0, longest))

    def page(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)
