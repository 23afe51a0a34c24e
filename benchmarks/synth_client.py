"""Measure the cost of `synth generate` itself, with a server that answers immediately.

    python benchmarks/synth_client.py [--rows 20000] [--memory | --layers]

Prints conversations/s and the ratio to 256 threads on the `openai` package that send the same requests and store
nothing. With --memory: the ratio of peak memory over 1,000,000 rows and over 10,000. With --layers: requests/s of 256
tasks on each layer of the async client, and the ratio to its transport alone. Exits with an error unless every client
sends one request for each row, all of the same form.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from serve.server import find_port

ROOT = Path(__file__).resolve().parent.parent
THREADS = 256
MAX_TOKENS = 128
CONFIG: dict[str, Any] = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 4, "vocab_size": 2048}
LAYERS = {
    "typed": "client.chat.completions.create(**ASK, extra_body=IDS)",
    "low-level": "client.post('/chat/completions', body={**ASK, **IDS}, cast_to=httpx2.Response)",
    "transport": "http.post(str(client.base_url) + 'chat/completions', content=orjson.dumps({**ASK, **IDS}))",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="conversations of each client")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the clients alternate")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--layers", action="store_true", help="measure the layers of the async client instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve_at_once() as url:
        work = Path(folder)
        write_recipe(work)
        if args.memory:
            peaks = {rows: run_synth(work, rows, url)[1] for rows in (10_000, 1_000_000)}
            for rows, peak in peaks.items():
                print(f"{rows:>9} rows: peak {peak / 2**20:.0f} MiB")
            print(f"ratio {peaks[1_000_000] / peaks[10_000]:.2f} (limit 1.3)")
            return
        if args.layers:
            rates, forms = {}, {}
            for layer in LAYERS:
                rates[layer] = run_layer(layer, args.rows, url)
                forms[layer] = take_form(url, layer, args.rows)
            check_forms(forms)
            for layer, rate in rates.items():
                print(f"{layer:<10} {rate:.0f}/s: {rate / rates['transport']:.2f} of the transport")
            return
        ratios = []
        for _ in range(args.rounds):
            ours, _ = run_synth(work, args.rows, url)
            form = take_form(url, "synth generate", args.rows)
            threads = run_threads(args.rows // 4, url, form)
            check_forms({"synth generate": form, "the threads": take_form(url, "the threads", args.rows // 4)})
            ratios.append(ours / threads)
            print(f"synth generate {ours:.0f}/s, {THREADS} threads on openai {threads:.0f}/s: {ratios[-1]:.2f}x")
        print(f"ratio {sorted(ratios)[len(ratios) // 2]:.2f} (median of {args.rounds}; limit 3)")


def take_form(url: str, client: str, num_rows: int) -> dict[str, Any]:
    """Return the form of a client's requests, without the row's number. Exits unless it sent one for each row."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/seen") as answer:  # noqa: S310 (our own server)
        seen = json.load(answer)
    if seen["posts"] != num_rows:
        raise SystemExit(f"{client} sent {seen['posts']} requests, expected one for each of {num_rows} rows")
    return dict(json.loads(re.sub(r"number \d+", "number 0", seen["body"])))


def check_forms(forms: dict[str, dict[str, Any]]) -> None:
    """Exit unless all clients sent requests of the same form."""
    (first, form), *others = forms.items()
    for client, other in others:
        for key in sorted({*form, *other}):
            if form.get(key) != other.get(key):
                raise SystemExit(
                    f"the clients send other requests ({key}): {first} {form.get(key)!r}, {client} {other.get(key)!r}"
                )


@contextmanager
def serve_at_once() -> Iterator[str]:
    """Run benchmarks/zero_latency.py during the block; yield its URL."""
    port = find_port("127.0.0.1", None)
    command = [sys.executable, str(ROOT / "benchmarks/zero_latency.py"), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def write_recipe(folder: Path) -> None:
    """Write a recipe and its target: config, template, and a dummy weights file, which is not loaded."""
    target = folder / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(CONFIG))
    (target / "chat_template.jinja").write_text("{{ messages }}")
    words = {f"word{number}": number for number in range(CONFIG["vocab_size"])}
    Tokenizer(WordLevel(words, "word0")).save(str(target / "tokenizer.json"))
    save_file({"weight": np.zeros(8, np.float32)}, target / "model.safetensors")
    (folder / "recipe.yaml").write_text(
        f"target: {{path: {target}, num_aux_layers: 1}}\n"
        f"synth: {{temperature: 0, max_tokens: {MAX_TOKENS}, concurrency: {THREADS}}}\n"
    )


def run_synth(folder: Path, num_rows: int, url: str) -> tuple[float, int]:
    """Run `synth generate`; return conversations/s and its peak memory in bytes."""
    prompts, output = folder / f"{num_rows}.jsonl", folder / f"out-{num_rows}-{time.time_ns()}"
    with prompts.open("w") as file:
        for number in range(num_rows):
            file.write(json.dumps({"id": f"row-{number}", "prompt": f"What about number {number}?"}) + "\n")
    command = [sys.executable, "-c", "from synth.cli import main; main()", "generate", "--endpoint", url]
    command += ["-r", str(folder / "recipe.yaml"), "--prompts", str(prompts), "--output", str(output)]
    log = (folder / "synth.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"synth generate failed:\n{(folder / 'synth.log').read_text()[-2000:]}")
    state = json.loads((output / "run.json").read_text())
    if state["summary"]["done"] != num_rows:
        raise SystemExit(f"synth generate kept {state['summary']['done']} conversations, expected {num_rows}")
    return num_rows / state["seconds"], usage.ru_maxrss * 1024


def run_threads(num_rows: int, url: str, form: dict[str, Any]) -> float:
    """Run a pool of threads on the `openai` package, which send requests of `form`; return conversations/s."""
    settings = {key: value for key, value in form.items() if key not in ("model", "messages")}
    script = f"""
import time, openai
from concurrent.futures import ThreadPoolExecutor
client = openai.OpenAI(base_url={url!r}, api_key="EMPTY", max_retries=0)
def ask(number):
    client.chat.completions.create(
        model="target", messages=[{{"role": "user", "content": f"What about number {{number}}?"}}],
        extra_body={settings!r},
    )
started = time.monotonic()
with ThreadPoolExecutor({THREADS}) as pool:
    list(pool.map(ask, range({num_rows})))
print({num_rows} / (time.monotonic() - started))
"""
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def run_layer(layer: str, num_rows: int, url: str) -> float:
    """Call the async client at `layer`; return requests/s."""
    script = f"""
import asyncio, time, httpx2, openai, orjson
ASK = {{"model": "target", "messages": [{{"role": "user", "content": "What about number 1?"}}],
       "max_tokens": {MAX_TOKENS}, "temperature": 0}}
IDS = {{"return_token_ids": True}}
async def main():
    http = openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections={THREADS}))
    client = openai.AsyncOpenAI(base_url={url!r}, api_key="EMPTY", max_retries=0, http_client=http)
    todo = iter(range({num_rows}))
    async def work():
        for _ in todo:
            await ({LAYERS[layer]})
    started = time.monotonic()
    await asyncio.gather(*(work() for _ in range({THREADS})))
    print({num_rows} / (time.monotonic() - started))
    await http.aclose()
asyncio.run(main())
"""
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
