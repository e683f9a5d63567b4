"""Whatever computes tokens, each behind `base.Backend`. Heavy libraries are imported only by the one chosen."""

from server.engine.backends.base import Backend
from server.settings import DEMO_MODEL, Settings
from server.store.home import Home
from server.store.model_folder import default_served_name, resolve_model

MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs


def create_backend(settings: Settings) -> Backend:
    """The backend that QLOOP_ENGINE names. Raises ConfigError when the model is not there."""
    home = Home(settings.home)
    folder = resolve_model(settings.model or DEMO_MODEL, home)
    name = settings.served_model_name or default_served_name(settings.model or DEMO_MODEL)
    if settings.engine == "fake":
        from server.engine.backends.fake import FakeBackend, FakeOptions

        return FakeBackend(
            FakeOptions(
                model_path=folder,
                served_name=name,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_logprobs=MAX_LOGPROBS,
                tokens_per_s=settings.fake_tokens_per_s,
            )
        )
    from server.engine.backends.hf import HfBackend, HfOptions

    return HfBackend(
        HfOptions(
            model_path=folder,
            served_name=name,
            dtype=settings.hf_dtype,
            forward=settings.hf_forward,
            prefix_cache=settings.prefix_cache,
            kv_cache_gib=settings.kv_cache_gib,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_logprobs=MAX_LOGPROBS,
            trust_remote_code=settings.trust_remote_code,
            num_threads=settings.num_threads,
            hash_cache_path=home.hash_cache,
            kernel_cache=home.cache if settings.hf_kernels == "auto" else None,
        )
    )
