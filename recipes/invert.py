# SPDX-License-Identifier: MIT
"""Inverts a generator: finds the z whose sample comes closest to a picture, and so restores its hidden pixels.

    python gan.py train --data mnist --loss rpgan --size 32 --steps 2000
    python recipes/invert.py --extractor digits.pt2    # of classifier.py; names the digits between two pictures

The method is that of arXiv 1607.07539. All starts of all pictures descend in one batch; each picture keeps its best. A
single start is shown beside the best of them, and a straight line between two z beside the arc.

The table in recipes/README.md: "fitted, hidden pixels as black" fits the masked picture with the same starts, steps and
prior. One G and one draw of pictures and masks, so the spread of the figures is unknown. Six minutes of one core of an
Intel Xeon with bfloat16, beside other work, torch 2.14.1.
Takes `load_test_set` from classifier.py, `check_reader` from digits.py and `run_command` from report.py.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import classifier
import digits
import gan
import metrics
import report

MASKS = ("pepper", "rows", "square")


def visible_pixels(mask, n, size, generator):
    """Draws what stays visible, bool [n,1,size,size]. The masks hide 30%, every second row or a square of 8 of 28 px.

    The square's middle is drawn from the middle half of the picture.
    """
    row = torch.arange(size)[:, None]
    if mask == "pepper":
        visible = torch.rand(n, 1, size, size, generator=generator) > 0.3
    elif mask == "rows":
        visible = row % 2 == 0
    else:
        middle = size / 4 + size / 2 * torch.rand(2, n, 1, 1, 1, generator=generator)
        down = (row - middle[0]).abs()  # [n,1,size,1]
        right = (row.T - middle[1]).abs()
        visible = torch.maximum(down, right) > size / 7
    return visible.expand(n, 1, size, size)


def invert(G, x, visible, starts=5, steps=120, rate=0.3, noise=0.5):
    """Fits z to the visible pixels (bool [N,1,S,S]) of x[N,C,S,S]. With classes, the starts take them in turn.

    Returns each picture's best z[N,z_dim] and y[N], and all losses [steps,N,starts].
    """
    x = x.repeat_interleave(starts, dim=0)
    visible = visible.repeat_interleave(starts, dim=0)
    generator = torch.Generator().manual_seed(0)
    z = gan.sample_z(len(x), G.z_dim, generator=generator)
    start = torch.arange(len(x)) % starts
    y = start % max(1, G.num_classes)

    optimizer = torch.optim.Adam([z.requires_grad_()], rate)  # scales each coordinate alone: no start affects another
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dtype = gan.pick_dtype("auto", torch.device("cpu"))
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    losses = []
    for _ in range(steps):
        with autocast:
            sample = G(z, y)
        error = torch.where(visible, sample - x, 0)
        error = error.square().sum(dim=(1, 2, 3))
        length = z.square().sum(dim=1)
        loss = error + noise**2 * length  # but for a constant -log p(z | x), if pixels carry noise of this deviation
        (z.grad,) = torch.autograd.grad(loss.sum(), z)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach().view(-1, starts))
    first = torch.arange(0, len(z), starts)
    best = first + losses[-1].argmin(dim=1)
    return z.detach()[best], y[best], torch.stack(losses)


def copy_nearest(x, visible):
    """Fills each hidden pixel of x[N,C,S,S] with the nearest visible one."""
    side = torch.arange(x.shape[2], dtype=torch.float32)
    places = torch.cartesian_prod(side, side)
    distances = torch.cdist(places, places)  # [S*S,S*S]
    filled = []
    for image, seen in zip(x.flatten(2), visible.flatten(1)):
        nearest = distances.masked_fill(~seen, torch.inf).argmin(dim=1)
        filled.append(image[:, nearest])
    return torch.stack(filled).view_as(x)


def psnr(restored, x, where):
    """Measures the PSNR in dB of images [N,C,S,S] in [-1,1], over all pixels where bool [N,1,S,S] is true."""
    where = where.expand_as(x)
    error = (restored - x)[where]
    mean_square = error.square().mean()
    decibels = 10 * torch.log10(2**2 / mean_square)
    return decibels.item()


def walk(G, z, y, path=gan.arc, columns=9):
    """Walks along a path from z[0] and class y[0] to z[1] and y[1]: samples [columns,C,S,S]."""
    between = {}
    if G.num_classes:
        start, end = G.embed(y).split(1)
        between["embed.weight"] = line(start, end, columns)[0]
    points = path(z[:1], z[1:], columns)[0]
    inputs = points, torch.arange(columns)
    return torch.func.functional_call(G, between, inputs)


def line(a, b, n):
    """Walks straight from a[N,d] to b[N,d] in n points [N,n,d], shorter midway than nearly any z."""
    start = a[:, None]
    end = b[:, None]
    t = torch.linspace(0, 1, n)[:, None]
    return torch.lerp(start, end, t)


def load_unseen(config, folder):
    """Loads images that a run was not trained on, those of a folder or the test set of its data: uint8 [N,C,S,S]."""
    if folder:
        images, _, _ = gan.load_images(folder, config.size, config.channels)
    elif config.data in gan.TORCHVISION:
        images, _ = classifier.load_test_set(config.data, config.size, config.channels, config.data_dir)
    else:
        raise gan.UserError("--data: name a folder of pictures that the run was not trained on")
    return images


def draw_figure(path, panels, losses):
    """Writes a figure of losses [steps,starts] and panels {title: [(label, images [N,C,S,S], 9 of them shown)]}."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([[*MASKS], ["starts", "walks", "walks"]])
    axes["starts"].semilogy(losses.numpy(), linewidth=1)
    axes["starts"].set(title="loss of the starts of one picture", xlabel="step")
    for title, rows in panels.items():
        labels, images = zip(*rows)
        n = len(rows)
        columns = min(9, len(images[0]))
        shown = torch.cat([some[:columns] for some in images])
        shown = gan.to_uint8(shown)
        picture = gan.tile(shown, columns)
        axes[title].imshow(picture.permute(1, 2, 0).numpy())
        height = picture.shape[1] / n
        middles = [height * (i + 0.5) for i in range(n)]
        axes[title].set(title=title, xticks=[], yticks=middles, yticklabels=labels)
    with gan.atomic_write(path) as file:
        figure.savefig(file, format="png")


def restore(G, x, visible, starts, steps):
    """Restores x[N,C,S,S] in four ways, {name: images}, and returns all losses of the last [steps,N,starts] too."""
    restored = {"nearest pixel": copy_nearest(x, visible)}
    masked = torch.where(visible, x, -1)
    everything = torch.ones_like(visible)
    z, y, _ = invert(G, masked, everything, starts, steps)
    restored["as it is"] = G(z, y)
    fewest = max(1, G.num_classes)  # a start for each class
    z, y, _ = invert(G, x, visible, fewest, steps)
    restored["one start"] = G(z, y)
    z, y, losses = invert(G, x, visible, starts, steps)
    restored[f"best of {starts}"] = G(z, y)
    return restored, losses


def draw_walks(G, z, y, network):
    """Walks from each second picture's z[N,z_dim] and y[N] to the next one's, and names digits: [(text, images)]."""
    walks = []
    for i in range(0, min(6, len(z)), 2):
        ends = [i, (i + 1) % len(z)]
        for label, path in (("arc", gan.arc), ("line", line)):
            between = walk(G, z[ends], y[ends], path)
            if network:
                _, logits = network(gan.to_uint8(between))
                digits = logits.argmax(dim=1).tolist()
                label = " ".join([label, *map(str, digits)])
            walks.append((label, between))
    return walks


def study(run, data, n, starts, steps, extractor, seed, out):
    """Restores the pictures under each mask in four ways, walks between them, and draws all of it."""
    network = metrics.load_extractor(extractor) if extractor else None
    run = gan.find_run(run)
    G, config = gan.load_generator(run)
    if starts < G.num_classes:
        raise gan.UserError(f"--starts {starts}: give one for each of the {G.num_classes} classes, or more")
    images = load_unseen(config, data)
    if network:
        digits.check_reader(network, extractor, images)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:n]
    x = gan.to_float(images[chosen])

    panels = {}
    for mask in MASKS:
        visible = visible_pixels(mask, len(x), config.size, generator)
        restored, losses = restore(G, x, visible, starts, steps)
        scores = {name: psnr(images, x, ~visible) for name, images in restored.items()}
        shown = [f"{name} {score:.1f} dB" for name, score in scores.items()]
        gan.say(f"{mask}: {', '.join(shown)}")
        masked = torch.where(visible, x, 0)
        panels[mask] = [("true", x), ("masked", masked), *restored.items()]

    everything = torch.ones_like(visible)
    z, y, _ = invert(G, x, everything, starts, steps)
    ceiling = psnr(G(z, y), x, everything)
    gan.say(f"nothing hidden: best of {starts} {ceiling:.1f} dB")
    panels["walks"] = draw_walks(G, z, y, network)
    draw_figure(out, panels, losses[:, 0])


def positive(text):
    return gan.whole_number(text, 1)


def main(argv=None):
    parser = gan.Parser(prog="invert.py", description=__doc__.partition(":")[0])
    parser.add_argument("--run", help="run, by name or path (the newest in the folder runs)")
    parser.add_argument("--data", help="folder of pictures to invert (the test images of the run's data set)")
    parser.add_argument("--n", type=positive, default=100, help="pictures at most (100)")
    parser.add_argument("--starts", type=positive, default=5, help="descents per picture, at least one per class (5)")
    parser.add_argument("--steps", type=positive, default=120, help="steps per descent (120)")
    parser.add_argument("--extractor", help="program of classifier.py that names the digits along a walk")
    parser.add_argument("--seed", type=gan.whole_number, default=0, help="seed of the choice and of the masks (0)")
    parser.add_argument("--out", default="invert.png", help="PNG picture to write (invert.png)")
    report.run_command(study, parser, argv)


if __name__ == "__main__":
    main()
