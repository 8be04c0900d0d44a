"""Exits that learn together with their network, beside frozen ones and a cascade: three curves in one picture.

    python examples/joint_cifar10.py --data DIR --weights DIR [--epochs 10] [--images 50000] [--state DIR] [--out PNG]
    python examples/joint_cifar10.py --digits

``--data`` holds ``train``, ``val`` and ``test``, each with ``<class>/*.jpg`` of CIFAR-10; ``--weights`` holds
``resnet20.safetensors`` and ``resnet56.safetensors``. A ResNet-56 gets four exits: once it stays as it is, and once it
learns with them (hours on a CPU, minutes on a GPU; with ``--state`` a run that was stopped goes on where it was). The
cascade puts a ResNet-20 in front of it. Everything learns on ``train``, thresholds come from ``val``, curves from
``test``. ``--digits`` does the same with scikit-learn's digits, a ResNet-8 and a ResNet-20: a minute, no download."""

import warnings
from functools import partial
from pathlib import Path

from matplotlib import pyplot
from torchvision.transforms import v2

from adaptexit import CascadeSaver, JointRecipe, MultiExitClassifier, ParetoDisplay, ParetoFrontier
from adaptexit.backbones import resnet8_cifar

try:
    from examples.calexnet_cifar10 import arguments, digits_net, network_and_data
    from examples.cifar import pretrained
except ImportError:  # run as a script, from anywhere
    from calexnet_cifar10 import arguments, digits_net, network_and_data
    from cifar import pretrained

BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8)


def main() -> None:
    """Train both, calibrate all three, report."""
    parser = arguments(__doc__, "joint.png")
    parser.set_defaults(images=50_000)
    parser.add_argument("--epochs", type=int, default=10, help="of network and exits together")
    parser.add_argument("--state", type=Path, help="folder from which a stopped run goes on")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "on few samples")
    net, (train, val, test) = network_and_data(parser, args)
    if args.digits:
        exits, augment = ["layer1.0", "layer1.2", "layer2.0", "layer2.2"], None
        saver = digits_net(resnet8_cifar)
    else:
        exits = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
        augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)])
        saver = pretrained(20, args.weights)

    classifier = partial(MultiExitClassifier, net, exits, calibration_size=0.02, batch_size=64, verbose=1)
    recipe = JointRecipe(args.epochs, augment=augment, channels_last=True, checkpoint_dir=args.state)
    frozen = classifier().fit(*train).calibrate(*val)
    joint = classifier(recipe=recipe).fit(*train).calibrate(*val)
    cascade = CascadeSaver(net, saver).fit(*val)

    curves = {
        "frozen exits": frozen.pareto(*test),
        "exits and network together": joint.pareto(*test),
        "cascade": cascade.pareto(*test),
    }
    full_model = joint.history_["full_model"]
    print(f"the network alone: {curves['frozen exits'].full_accuracy:.4f} on {len(test[1])} test images")
    print(
        f"after learning with its exits, on {full_model['n']} images of val: {full_model['accuracy']:.4f} where it had "
        f"{full_model['original_accuracy']:.4f}; both agree on {100 * full_model['agreement']:.1f}%"
    )
    report(curves)
    draw(curves, args.out)


def report(curves: dict[str, ParetoFrontier]) -> None:
    """Test accuracy below that of the network as it was given, at every budget."""
    full = curves["frozen exits"].full_accuracy
    print("\nTest accuracy below the network's own (points), at a budget held on the calibration data")
    print("| " + " | ".join(["", *(f"{budget:>6}" for budget in BUDGETS)]) + " | full model |")
    for name, frontier in curves.items():
        cells = []
        for budget in BUDGETS:
            reachable = budget >= min(point.cost for point in frontier.points)
            cells.append(f"{100 * (full - frontier.at(budget=budget).accuracy):6.2f}" if reachable else "     -")
        print(f"| {name:26} | " + " | ".join(cells) + f" | {100 * (full - frontier.full_accuracy):10.2f} |")


def draw(curves: dict[str, ParetoFrontier], out: str) -> None:
    """The three curves."""
    figure, ax = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for name, frontier in curves.items():
        ParetoDisplay.from_frontier(frontier, name=name).plot(ax)
    ax.set_title("test accuracy against cost")
    figure.savefig(out, dpi=120)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
