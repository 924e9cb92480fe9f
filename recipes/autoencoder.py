# SPDX-License-Identifier: MIT
"""Makes a generator of an autoencoder: a loss on their moments makes its latents normal, so the decoder can take noise.

    python recipes/autoencoder.py --gan RUN    # of gan.py on mnist at 32 px; classifier.py makes digits.pt2

Each latent comes to 0.034 from normal (median Kolmogorov distance), yet samples are no digits: FD(digits) 340; without
the loss 728, or 377 of noise as wide as each latent; a GAN's 10.5. The loss sees each latent by itself; that of arXiv
1511.05644 compares all jointly. One seed, 5 minutes of one core of an AMD EPYC, torch 2.14.1.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.datasets import MNIST

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import gan
import metrics
import report


class Autoencoder(nn.Module):
    """Encodes images [N,1,32,32] in [-1,1] as latents [N,100], and decodes these."""

    def __init__(self, d=100, a=16, b=32, c=64):
        super().__init__()
        down = lambda i, o: (nn.Conv2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU())  # noqa: E731
        up = lambda i, o: (nn.BatchNorm2d(i), nn.ReLU(), nn.ConvTranspose2d(i, o, 4, 2, 1))  # noqa: E731
        self.encode = nn.Sequential(*down(1, a), *down(a, b), *down(b, c), nn.Flatten(), nn.Linear(16 * c, d))
        grid = nn.Linear(d, 16 * c), nn.Unflatten(1, (c, 4, 4))
        self.decode = nn.Sequential(*grid, *up(c, b), *up(b, a), *up(a, 1), nn.Tanh())


def moment_loss(z):
    """Compares each column of z[N,D] with a standard normal: mean 0, variance 1, kurtosis 3. Returns a scalar >= 0."""
    mean = z.mean(dim=0)
    variance = (z - mean).square().mean(dim=0)
    kurtosis = (z - mean).pow(4).mean(dim=0) / variance.square()
    return (mean.square() + (variance - 1).square() + (kurtosis - 3).square()).mean()


def kolmogorov_distance(z):
    """Finds the largest gap between the distribution of each column of z[N,D] and the standard normal's: [D]."""
    share, normal = torch.linspace(0, 1, len(z) + 1)[:, None], torch.special.ndtr(z.sort(dim=0).values)
    return torch.maximum(share[1:] - normal, normal - share[:-1]).amax(dim=0)  # just after and just before each step


def train(images, test, epochs, moments=True, seed=0, batch=128):
    """Trains an autoencoder on uint8 images [N,1,32,32], with the moment loss or without. Returns it, frozen, and the
    latents of uint8 test[M,1,32,32] after each epoch, [epochs,M,100]."""
    torch.manual_seed(seed)
    net, history = Autoencoder().to(memory_format=torch.channels_last), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(images) // batch))
    dtype = gan.pick_dtype("auto", torch.device("cpu"))
    for epoch in range(epochs):
        factor = moments * 0.001 * 2048 ** (epoch / max(1, epochs - 1))  # up to 2.048: rebuild first, then shape
        for i in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            x = gan.to_float(images[i])
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                z = net.train().encode(x).float()  # fourth moments need float32
                restored = net.decode(z).float()
            loss = nn.functional.mse_loss(restored, x) + factor * moment_loss(z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()  # so that means and variances come to rest
        with torch.no_grad():
            history.append(net.eval().encode(gan.to_float(test)))
        gan.say(f"epoch {epoch + 1}/{epochs}  factor {factor:.3f}  loss {loss.item():.4f}")
    return net.eval().requires_grad_(False), torch.stack(history)


def invert(G, images, starts=8, steps=120):
    """Finds z[N,z_dim] whose samples come close to uint8 images [N,1,32,32]: the best of some starts of descent."""
    x, generator = gan.to_float(images).repeat(starts, 1, 1, 1), torch.Generator().manual_seed(0)
    z = gan.sample_z(len(x), G.z_dim, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.3)
    for _ in range(steps):
        error = (G(z) - x).square().sum(dim=(1, 2, 3)) + z.square().sum(dim=1) / 4  # keeps z likely
        z.grad = torch.autograd.grad(error.sum(), z)[0]
        optimizer.step()
    return z.detach().view(starts, len(images), -1)[error.view(starts, -1).argmin(dim=0), torch.arange(len(images))]


def walk(ends, columns=9):
    """Goes in straight lines from ends[0] to ends[1], from ends[2] to ends[3], ...: [N,D] -> [N/2*columns,D]."""
    return torch.lerp(ends[0::2, None], ends[1::2, None], torch.linspace(0, 1, columns)[:, None]).flatten(0, 1)


def draw_figure(path, history, pictures):
    """Writes a figure: distributions of the latents history[epochs,M,100], and {title: uint8 images [n,1,32,32]}."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
    x = torch.linspace(-3, 3, 200)
    for axes, epoch in zip(top.subplots(1, 4, sharey=True), (1, 2, 3, len(history))):
        shares = torch.stack([(history[epoch - 1] <= value).float().mean(dim=0) for value in x])  # [200,100]
        axes.plot(x, shares, color="tab:blue", linewidth=0.3)
        axes.plot(x, torch.special.ndtr(x), "k--")
        axes.set_title(f"latents after epoch {epoch}")
    for axes, (title, images) in zip(bottom.subplots(1, len(pictures), squeeze=False)[0], pictures.items()):
        axes.imshow(gan.tile(images, 9).permute(1, 2, 0).numpy())
        axes.set(title=title, xticks=[], yticks=[])
    with gan.whole_file(path) as file:
        figure.savefig(file, format="png")


def study(data_dir, extractor, run, epochs, seed, out):
    """Trains the autoencoder without and with the moment loss, and scores both beside a GAN's run."""
    G = gan.load_generator(run)[0] if run else None
    if G and (G.size, G.channels, G.num_classes) != (32, 1, 0):
        raise gan.UserError(f"--gan {run}: give a run on gray images of 32 pixels, without --cond")
    extractor, images = metrics.load_extractor(extractor), gan.load_images("mnist", 32, 1, data_dir)[0]
    test = gan.decode([image for image, _ in MNIST(data_dir, train=False)], 32, 1)["images"]
    real = metrics.measure(extractor, images[: len(test)]).stats
    score = lambda fake: metrics.frechet_distance(real, metrics.measure(extractor, fake).stats)  # noqa: E731
    noise, drawn = torch.randn(len(test), 100, generator=torch.Generator().manual_seed(seed)), {}
    for name, moments in (("without moments", False), ("with moments", True)):
        net, history = train(images, test, epochs, moments, seed)
        z, decode = history[-1], lambda z: gan.to_uint8(net.decode(z))  # noqa: E731
        samples, rescaled = decode(noise), decode(z.mean(dim=0) + z.std(dim=0) * noise)
        gap, error = kolmogorov_distance(z).median(), nn.functional.mse_loss(net.decode(z), gan.to_float(test))
        gan.say(f"{name}: latents {gap:.3f} from normal (median), test pictures off by {error:.4f} (mean square)")
        gan.say(f"{name}: FD(digits) {score(samples):.1f}, of noise as wide as each latent {score(rescaled):.1f}")
        drawn[name] = torch.cat([samples[:54], decode(walk(z[:4]))])
    if G:
        samples = gan.generate(G, len(test), seed=seed)
        gan.say(f"GAN: FD(digits) {score(samples):.1f}")
        starts, ends = invert(G, test[:4]).view(2, 2, -1).unbind(dim=1)
        drawn["GAN"] = torch.cat([samples[:54], gan.to_uint8(G(gan.arc(starts, ends, 9).flatten(0, 1)))])
    draw_figure(out, history, drawn)


def main(argv=None):
    parser = gan.Parser(prog="autoencoder.py", description=__doc__.partition(":")[0])
    parser.add_argument("--data-dir", default="data", help="where mnist lies or is downloaded to (data)")
    parser.add_argument("--extractor", default="digits.pt2", help="program of classifier.py (digits.pt2)")
    parser.add_argument("--gan", metavar="RUN", dest="run", help="run of gan.py on mnist, to compare with")
    parser.add_argument("--epochs", type=lambda text: gan.whole_number(text, 3), default=6, help="epochs (6)")
    parser.add_argument("--seed", type=gan.whole_number, default=0, help="seed of weights, order and noise (0)")
    parser.add_argument("--out", default="autoencoder.png", help="PNG picture to write (autoencoder.png)")
    report.run_command(study, parser, argv)


if __name__ == "__main__":
    main()
