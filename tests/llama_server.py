"""llama.cpp's server: the binary that ``LLAMA_SERVER`` names, or the one that the package xllamacpp holds."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

BINARY = os.environ.get("LLAMA_SERVER")
MISSING = None if BINARY or importlib.util.find_spec("xllamacpp") else "LLAMA_SERVER names none, and xllamacpp is not here"
SLOTS, CONTEXT = 8, 1024


def write_gguf(model, tokenizer, file):
    """Write a tiny Llama of bytes as llama.cpp reads it."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    special = tokenizer.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([str(tokenizer.convert_ids_to_tokens(token)) for token in range(config.vocab_size)])
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in range(config.vocab_size)]
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])  # one has to be there; none of its parts ever meet: no token is made of two
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # halves of a head, as transformers rotates them, become pairs
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaServer:
    """llama.cpp's server on a free port, as long as a ``with`` block lasts."""

    def __init__(self, file, slots=SLOTS, context=CONTEXT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", tempfile.NamedTemporaryFile()  # noqa: SIM115
        arguments = [str(file), str(port), str(slots), str(slots * context)]
        command = [sys.executable, __file__, *arguments]
        if BINARY:
            file, port, slots, context = arguments
            command = [BINARY, "-m", file, "--port", port, "-np", slots, "-c", context, "-t", "1", "-fa", "off"]
            command += ["-ctk", "f32", "-ctv", "f32"]  # what it keeps of a prompt as precise as what it computes
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self):
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(Path(self.log.name).read_text(errors="replace")[-3000:])

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def busy(self):
        """Requests that are being written."""
        return sum(slot["is_processing"] for slot in httpx2.get(f"{self.url}/slots").json())


def serve(file, port, slots, context):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel, params.n_ctx = file, int(port), int(slots), int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.hostnames, params.n_gpu_layers, params.warmup, params.endpoint_slots = ["127.0.0.1"], 0, False, True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    time.sleep(10**6)


if __name__ == "__main__":
    serve(*sys.argv[1:])
