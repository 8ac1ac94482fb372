"""Short films of the networks in a record, beside their action values.

    python benchmarks/films.py benchmarks/records/2026-11-29_cartpole_500k

For each file in the record's networks/ it plays one greedy episode, of a seed that no training had,
and writes films/NAME.gif: 25 pictures a second, at most --seconds. Next to the game stands a bar
for each action value, from the lowest to the highest of the film; the chosen action is orange.
MinAtar's objects have one colour each. Other environments draw themselves; gymnasium's classic ones
need `pip install '.[video]'`.
"""

import argparse
import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
from figures import COLOURS, pyplot
from machine import ROOT

PICTURES_PER_SECOND = 25
SIZE = 240  # pixels, height of a film
SEED = 2**40  # of the played episode


def load(name):
    """The module of a script in algos/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def agent_of(file):
    """A network of a record -> its script, its arguments, one environment, the network."""
    import torch

    saved = torch.load(file, map_location="cpu", weights_only=True)
    script = load(saved["script"])
    args = script.RunArgs(**saved["args"])
    pictures = {} if args.env_id.startswith("MinAtar/") else {"render_mode": "rgb_array"}
    envs = script.make_envs(args.env_id, 1, SEED, **pictures)
    q_network = make_network(script, args, envs)
    q_network.load_state_dict(saved["q_network"])
    return script, args, envs, q_network.eval()


def make_network(script, args, envs):
    """A script's untrained network; what its QNetwork takes differs between the scripts."""
    parameters = inspect.signature(script.QNetwork).parameters
    sources = (envs, args)  # of obs_space, n_actions, hidden_sizes
    given = [args if name == "args" else value_of(name, sources) for name in parameters]
    return script.QNetwork(*given)


def value_of(name, sources):
    return next(getattr(source, name) for source in sources if hasattr(source, name))


def play(file, most):
    """One greedy episode. -> its pictures, action values and actions: at most `most` of each"""
    import torch

    script, args, envs, q_network = agent_of(file)
    rng, cpu = np.random.default_rng(SEED), torch.device("cpu")
    pictures, values, actions = [], [], []
    obs, over = envs.reset(), False
    while not over and len(actions) < most:
        with torch.inference_mode():
            values.append(q_network(torch.from_numpy(obs)).numpy()[0])
        action = script.act(q_network, obs, args.eval_e, rng, cpu)
        pictures.append(picture_of(envs, obs[0]))
        actions.append(int(action[0]))
        obs, _, terminations, truncations, _ = envs.step(action)
        over = bool(terminations[0] or truncations[0])
    return pictures, np.array(values), actions


def picture_of(envs, obs):
    """What the environment shows now, (SIZE, W, 3) uint8."""
    from PIL import Image

    if obs.ndim == 1:
        picture = Image.fromarray(envs.envs[0].render())
        return np.asarray(picture.resize((picture.width * SIZE // picture.height, SIZE)))
    colours = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLOURS]
    picture = np.full((*obs.shape[:2], 3), 255, np.uint8)
    for channel in range(obs.shape[2]):
        picture[obs[..., channel] > 0] = colours[channel % len(colours)]
    scale = SIZE // len(picture)
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def bars(values, chosen, low, high):
    """A bar for each action value, on a scale from `low` to `high`, (SIZE, 120, 3) uint8."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (120, SIZE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), "action values", fill="black")
    height = min((SIZE - 26) // len(values), 30)
    for action, value in enumerate(values):
        y, colour = 26 + height * action, "#c44e00" if action == chosen else "#808080"
        draw.text((8, y), str(action), fill=colour)
        draw.text((112, y), f"{value:.2f}", fill=colour, anchor="ra")
        length = 104 * (value - low) / max(high - low, 1e-9)
        draw.rectangle((8, y + height - 7, 8 + length, y + height - 4), fill=colour)
    return np.asarray(image)


def write_film(file, path, most):
    """Play an episode and write it as a GIF. -> number of its pictures"""
    from PIL import Image

    pictures, values, actions = play(file, most)
    low, high = values.min(), values.max()
    frames = [
        Image.fromarray(np.concatenate([picture, bars(v, action, low, high)], axis=1))
        for picture, v, action in zip(pictures, values, actions)
    ]
    # One palette for all, from ten of them: the file is smaller and does not flicker.
    some = np.concatenate([np.asarray(frame) for frame in frames[:: max(len(frames) // 10, 1)]])
    palette = Image.fromarray(some).quantize(64)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(exist_ok=True)
    duration = 1000 // PICTURES_PER_SECOND
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return len(frames)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path, help="folders with a folder networks/")
    parser.add_argument("--seconds", type=float, default=8.0, help="longest film")
    args = parser.parse_args()
    pyplot()  # exits here if matplotlib, which brings Pillow, is missing
    most = round(args.seconds * PICTURES_PER_SECOND)
    if most < 1:
        parser.error("--seconds must be 0.04 or more")
    for record in args.records:
        files = sorted((record / "networks").glob("*.pt"))
        if not files:
            sys.exit(f"error: {record} has no networks/*.pt; records of train.py have them.")
        for file in files:
            path = record / "films" / f"{file.stem}.gif"
            n = write_film(file, path, most)
            print(f"{path}: {n} pictures, {path.stat().st_size // 1024} KiB", flush=True)


if __name__ == "__main__":
    main()
