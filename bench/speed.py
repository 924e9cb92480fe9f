# SPDX-License-Identifier: MIT
"""gan.py's training step beside a textbook loop of the very same networks: images a second, memory, sampling.

    python bench/speed.py                                        # 64 px, width 32, batch 32, conditional, float32
    python bench/speed.py --size 32 --width 16 --batch 64
    python bench/speed.py --amp bf16 --profile                   # and where the time goes

The textbook: nearest upsampling, then a convolution; a convolution, then average pooling; NCHW; D looks at real and fake in
two passes, and takes gradients of its own in G's step; Adam and averaged weights in Python loops; .item() at every step;
float32. Both loops run in one process, in turns; times are medians.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The textbook networks: gan.py's modules, run as the papers draw them


class TextbookNorm(gan.AdaptiveBatchNorm):
    def forward(self, h, e):
        gain, bias = self.gain_bias(e).chunk(2, dim=1)
        return (1 + gain)[:, :, None, None] * self.norm(h) + bias[:, :, None, None]


class TextbookGeneratorBlock(gan.GeneratorBlock):
    def forward(self, x, e):
        h = F.relu(self.norm1(x, e))
        h = self.conv1(F.interpolate(h, scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, e)))
        return h + self.skip(F.interpolate(x, scale_factor=2))


class TextbookDiscriminatorBlock(gan.DiscriminatorBlock):
    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h + self.skip(x), 2)


class TextbookGenerator(gan.Generator):
    def forward(self, z, y=None):
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, e)
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class TextbookDiscriminator(gan.Discriminator):
    def forward(self, x, y=None):
        h = self.conv(x)
        for block in self.blocks:
            h = block(h)
        phi = F.relu(h).sum(dim=(2, 3))
        logits = self.linear(phi).squeeze(1)
        return logits + (phi * self.embed(y)).sum(dim=1) if self.num_classes else logits


TEXTBOOK = {
    gan.Generator: TextbookGenerator,
    gan.Discriminator: TextbookDiscriminator,
    gan.GeneratorBlock: TextbookGeneratorBlock,
    gan.DiscriminatorBlock: TextbookDiscriminatorBlock,
    gan.AdaptiveBatchNorm: TextbookNorm,
}


def textbook(net):
    """A copy of G or D with the same weights and statistics, in the textbook's form and NCHW."""
    net = copy.deepcopy(net)
    for m in net.modules():
        m.__class__ = TEXTBOOK.get(type(m), type(m))
    return net.to(memory_format=torch.contiguous_format)


def textbook_state(state):
    """A copy of gan.py's State in textbook form: its networks, and Adam as a loop over parameters."""
    other = copy.copy(state)
    other.G, other.D, other.G_ema = (textbook(net) for net in (state.G, state.D, state.G_ema))
    for name, net in (("opt_G", other.G), ("opt_D", other.D)):
        group = getattr(state, name).param_groups[0]
        adam = torch.optim.Adam(net.parameters(), lr=group["lr"], betas=group["betas"], foreach=False)
        setattr(other, name, adam)
    return other


def textbook_step(state, data):
    """One iteration as it is usually written. Returns the two losses as numbers."""
    c, G, D = state.config, state.G, state.D
    d_loss, g_loss = gan.LOSSES[c.loss]
    real, y = next(data)

    fake = G(torch.randn(c.batch, c.z_dim, device=real.device), y).detach()
    loss_D = d_loss(D(gan.diff_augment(real, c.augment), y), D(gan.diff_augment(fake, c.augment), y))
    state.opt_D.zero_grad()
    loss_D.backward()
    state.opt_D.step()

    fake = G(torch.randn(c.batch, c.z_dim, device=real.device), y)
    loss_G = g_loss(D(gan.diff_augment(fake, c.augment), y))
    state.opt_G.zero_grad()
    loss_G.backward()
    state.opt_G.step()

    state.step += 1
    with torch.no_grad():
        for average, p in zip(state.G_ema.parameters(), G.parameters()):
            average.mul_(0.999).add_(p, alpha=0.001)
        for average, b in zip(state.G_ema.buffers(), G.buffers()):
            average.copy_(b)
    return loss_D.item(), loss_G.item()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_in_turns(turns, works, device):
    """The seconds of each turn of each work, [len(works)][turns]; the works take turns."""
    seconds = [[] for _ in works]
    for _ in range(turns):
        for work, taken in zip(works, seconds):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            taken.append(time.perf_counter() - started)
    return seconds


def make_states(args):
    config = gan.Config(
        loss="hinge", cond=True, size=args.size, width=args.width, batch=args.batch, amp=args.amp, device=args.device
    )
    config = gan.replace(gan.resolve(config), augment=args.augment)
    device = gan.pick_device(config.device)
    images, labels, classes = gan.load_images("synthetic", config.size, config.channels)
    torch.manual_seed(0)
    state = gan.new_state(config, classes, device)
    data = gan.batches(gan.place(images, device), labels, config, device)
    return state, textbook_state(state), data, device


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--amp", default="off")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--augment", default="color,translation,cutout")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    gan.hold_memory()  # as the train command does; it serves both
    state, other, data, device = make_states(args)
    works = [lambda: textbook_step(other, data), lambda: gan.train_step(state, data)]
    seconds_in_turns(4, works, device)
    if args.profile:
        return profile(state, data)
    slow, fast = (statistics.median(s) for s in seconds_in_turns(args.turns, works, device))
    print(
        f"step: textbook {slow:.3f} s, gan.py {fast:.3f} s, {slow / fast:.2f}x, {args.batch / fast:.1f} images/s",
        flush=True,
    )


def profile(state, data):
    with torch.profiler.profile(record_shapes=True) as prof:
        for _ in range(2):
            gan.train_step(state, data)
    print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
