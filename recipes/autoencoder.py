# SPDX-License-Identifier: MIT
"""Makes a generator of an autoencoder: a loss on their moments makes its latents normal, so the decoder can take noise.

    python gan.py train --data mnist --loss rpgan --size 32 --steps 2000
    python recipes/autoencoder.py --gan RUN    # the run above; classifier.py makes digits.pt2

The moment loss asks for mean, variance and kurtosis of each latent by itself, so samples are strokes in disorder. A
mixture of 50 normals, fitted to the latents of 20,000 images, heeds how they depend on one another, and draws digits
with the moment loss or without. The loss of arXiv 1511.05644 compares all latents jointly. Between two test pictures
the autoencoder fades one out and the other in; the GAN's walk stays one digit, as sharp as its ends.

The table in recipes/README.md: MNIST at 32 px, six epochs, one seed, so read only the large differences. Distances and
errors are of the 10,000 test images, FD of 10,000 samples against as many training images. 13 minutes of one core of an
Intel Xeon with bfloat16, beside other work, torch 2.14.1.
Takes `load_test_set` from classifier.py, `invert` and `line` from invert.py, and `run_command` from report.py.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import classifier
import gan
import metrics
import report
from invert import invert, line

LATENTS = 100
BATCH = 128
FACTORS = (0, 0.02, 0.2, 2)  # of the moment loss


class Autoencoder(nn.Module):
    """Encodes images [N,1,32,32] in [-1,1] as latents [N,100], and decodes these."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(
            *down(1, 16),
            *down(16, 32),
            *down(32, 64),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, LATENTS),
        )
        self.decode = nn.Sequential(
            nn.Linear(LATENTS, 64 * 4 * 4),
            nn.Unflatten(1, (64, 4, 4)),
            *up(64, 32),
            *up(32, 16),
            *up(16, 1),
            nn.Tanh(),
        )


def down(c_in, c_out):
    """Builds layers that halve the resolution."""
    conv = nn.Conv2d(c_in, c_out, 4, 2, 1)
    return conv, nn.BatchNorm2d(c_out), nn.ReLU()


def up(c_in, c_out):
    """Builds layers that double the resolution."""
    conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)
    return nn.BatchNorm2d(c_in), nn.ReLU(), conv


def moment_loss(z):
    """Compares each column of z[N,D] with a standard normal: mean 0, variance 1, kurtosis 3. Returns a scalar >= 0."""
    mean = z.mean(dim=0)
    centred = z - mean
    variance = centred.square().mean(dim=0)
    kurtosis = centred.pow(4).mean(dim=0) / variance.square()
    loss = mean.square() + (variance - 1).square() + (kurtosis - 3).square()
    return loss.mean()


def kolmogorov_distance(z):
    """Finds the largest gap between the distribution of each column of z[N,D] and the standard normal's: [D]."""
    share = torch.linspace(0, 1, len(z) + 1)[:, None]
    normal = torch.special.ndtr(z.sort(dim=0).values)
    after = share[1:] - normal  # each step of the one
    before = normal - share[:-1]
    return torch.maximum(after, before).amax(dim=0)


def train(images, test, epochs, factor, seed=0, batch=BATCH):
    """Trains an autoencoder on uint8 images [N,1,32,32]; the factor of the moment loss grows to this one.

    Returns it, frozen, and the latents of uint8 test[M,1,32,32] after each epoch, [epochs,M,100].
    """
    torch.manual_seed(seed)
    net = Autoencoder().to(memory_format=torch.channels_last)
    per_epoch = len(images) // batch
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    dtype = gan.pick_dtype("auto", torch.device("cpu"))
    history = []
    for epoch in range(epochs):
        so_far = epoch / max(1, epochs - 1)
        weight = factor * 2048 ** (so_far - 1)  # rebuild first, then shape
        net.train()
        for i in torch.randperm(len(images)).split(batch)[:per_epoch]:
            x = gan.to_float(images[i])
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                z = net.encode(x).float()  # fourth moments need float32
                restored = net.decode(z).float()
            loss = F.mse_loss(restored, x)
            if factor:
                loss = loss + weight * moment_loss(z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()  # so that means and variances come to rest
        net.eval()
        with torch.no_grad():
            history.append(net.encode(gan.to_float(test)))
        gan.say(f"epoch {epoch + 1}/{epochs}  factor {weight:.3g}  loss {loss.item():.4f}")
    return net.requires_grad_(False), torch.stack(history)


def fit_mixture(z, k=50, rounds=20):
    """Fits k normals with covariances of their own to z[N,D] by expectation-maximisation; returns their mixture."""
    chosen = torch.randperm(len(z))[:k]
    nearest = torch.cdist(z, z[chosen]).argmin(dim=1)
    shares = F.one_hot(nearest, k).float()  # of each normal in each z, [N,k]
    least = 1e-3 * torch.eye(z.shape[1])
    for _ in range(rounds):
        counts = shares.sum(dim=0)
        means = shares.T @ z / counts[:, None]
        covariances = [torch.cov(z.T, correction=0, aweights=share) for share in shares.T]
        normals = MultivariateNormal(means, torch.stack(covariances) + least)
        densities = [normals.log_prob(some[:, None]) for some in z.split(1000)]
        logits = torch.cat(densities) + counts.log()
        shares = logits.softmax(dim=1)
    return MixtureSameFamily(Categorical(counts), normals)


def draw_figure(path, history, pictures):
    """Writes a figure: distributions of the latents history[epochs,M,100], and {title: uint8 images [n,1,32,32]}."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
    x = torch.linspace(-3, 3, 200)
    panels = top.subplots(1, 4, sharey=True)
    for axes, epoch in zip(panels, (1, 2, 3, len(history))):
        below = [history[epoch - 1] <= value for value in x]
        shares = [share.float().mean(dim=0) for share in below]
        axes.plot(x, torch.stack(shares), color="tab:blue", linewidth=0.3)
        axes.plot(x, torch.special.ndtr(x), "k--")
        axes.set_title(f"latents after epoch {epoch}")
    bottom.suptitle("autoencoder, two rows each: N(0,1), noise as wide as each latent, the mixture, walks")
    panels = bottom.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (title, images) in zip(panels, pictures.items()):
        axes.imshow(gan.tile(images, 9).permute(1, 2, 0).numpy())
        axes.set(title=title, xticks=[], yticks=[])
    with gan.atomic_write(path) as file:
        figure.savefig(file, format="png")


def study(data_dir, extractor, run, epochs, seed, out):
    """Trains the autoencoder with each factor of the moment loss, and scores what it draws beside a GAN's run."""
    G = load_gan(run) if run else None
    network = metrics.load_extractor(extractor)
    images, _, _ = gan.load_images("mnist", 32, 1, data_dir)
    test, _ = classifier.load_test_set("mnist", 32, 1, data_dir)
    real = metrics.measure(network, images[: len(test)]).stats

    def score(samples):
        return metrics.frechet_distance(real, metrics.measure(network, samples).stats)

    drawn = {}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(test), LATENTS, generator=generator)
    for factor in FACTORS:
        name = f"factor {factor}"
        net, history = train(images, test, epochs, factor, seed)
        z = history[-1]
        gap = kolmogorov_distance(z).median()
        restored = net.decode(z)
        error = F.mse_loss(restored, gan.to_float(test))
        gan.say(f"{name}: latents {gap:.3f} from normal (median), test pictures off by {error:.4f} (mean square)")

        seen = net.encode(gan.to_float(images[:20_000]))
        mixture = fit_mixture(seen)
        mixed = [mixture.sample([len(some)]) for some in noise.split(100)]  # all at once would take 20 GB
        inputs = {
            "N(0,1)": noise,
            "noise as wide as each latent": z.mean(dim=0) + z.std(dim=0) * noise,
            "a mixture of normals": torch.cat(mixed),
        }
        rows = []
        for title, some in inputs.items():
            samples = gan.to_uint8(net.decode(some))
            gan.say(f"{name}: FD(digits) {score(samples):.1f} of {title}")
            rows.append(samples[:18])
        between = line(z[0:4:2], z[1:4:2], 9).flatten(0, 1)
        rows.append(gan.to_uint8(net.decode(between)))
        drawn[name] = torch.cat(rows)
    if G:
        samples = gan.generate(G, len(test), seed=seed)
        gan.say(f"GAN: FD(digits) {score(samples):.1f}")
        x = gan.to_float(test[:4])
        z, _, _ = invert(G, x, torch.ones_like(x, dtype=torch.bool), starts=8)
        points = gan.arc(z[0::2], z[1::2], 9).flatten(0, 1)
        between = gan.to_uint8(G(points))
        drawn["GAN"] = torch.cat([samples[:54], between])
    draw_figure(out, history, drawn)


def load_gan(run):
    """Loads the generator of a run that draws what the autoencoder does."""
    G, config = gan.load_generator(run)
    if (config.size, config.channels, G.num_classes) != (32, 1, 0):
        raise gan.UserError(f"--gan {run}: give a run on gray images of 32 pixels, without --cond")
    return G


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
