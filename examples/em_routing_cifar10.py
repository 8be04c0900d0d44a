"""EM routing beside the simple rules that it must beat, on a frozen ResNet: a table, curves and the effect of lambda.

    python examples/em_routing_cifar10.py --data DIR --weights DIR [--images 20000] [--paper-costs] [--out PNG]
    python examples/em_routing_cifar10.py --digits

``--data`` holds ``train``, ``val`` and ``test``, each with ``<class>/*.jpg`` of CIFAR-10; ``--weights`` holds
``resnet56.safetensors``. Two-layer heads on pooled features learn on ``train`` behind three blocks, routers on what
those heads answer there; thresholds come from ``val``, and everything is reported on ``test``. ``--digits`` does the
same with scikit-learn's digits and a ResNet-20 that is trained first: half a minute, and no download. With
``--paper-costs`` exits cost 1/4, 2/4, 3/4 and all of the full model instead of their multiply-accumulates."""

import warnings

import numpy as np
from matplotlib import pyplot
from sklearn.exceptions import ConvergenceWarning

from adaptexit import CPMCalibrator, EENetScheduler, EMRouter, MultiExitClassifier, ThresholdCalibrator, compare
from adaptexit.displays import BarsDisplay, ComparisonDisplay, SweepDisplay

try:
    from examples.calexnet_cifar10 import arguments, network_and_data
except ImportError:  # run as a script, from anywhere
    from calexnet_cifar10 import arguments, network_and_data

PRIORS = ("amortized", "global", "per_sample")
COST_WEIGHT = 1.0
BUDGET = 0.8


def main() -> None:
    """Train heads and routers, compare, report."""
    parser = arguments(__doc__, "em_routing.png")
    parser.add_argument("--paper-costs", action="store_true", help="1/4, 2/4, 3/4 and 1 instead of MACs")
    args = parser.parse_args()
    net, (train, val, test) = network_and_data(parser, args)
    exits = ["layer1.2", "layer2.2", "layer3.1"] if args.digits else ["layer1.8", "layer2.8", "layer3.4"]
    warnings.simplefilter("ignore", ConvergenceWarning)  # long chains of EM steps are told in posterior_.history

    model = MultiExitClassifier(
        net, exits, recipe="frozen", calibrator=EMRouter(COST_WEIGHT), batch_size=64, calibration_size=0.02,
        cost=[0.25, 0.5, 0.75, 1.0] if args.paper_costs else "macs",
    )  # fmt: skip
    model.fit(*train).calibrate(*val)
    outputs, training, answers = model.outputs_, model.training_outputs_, model.record(*test)

    methods = {"BranchyNet (entropy)": ThresholdCalibrator("entropy"), "largest probability": ThresholdCalibrator()}
    methods |= {"class precision margins": CPMCalibrator(), "EENet's schedule": EENetScheduler(BUDGET)}
    for prior in PRIORS:
        methods[f"EM routing, {prior}"] = EMRouter(COST_WEIGHT, prior)
    comparison = compare(outputs, methods, test=answers, training=training, exit_names=model.exit_names)
    print(f"Test accuracy and mean relative cost at a budget of {BUDGET}, held on the calibration data")
    print(comparison.to_frame(budget=BUDGET).round(4).to_string())

    weights = np.geomspace(0.1, 10, 5 if args.digits else 15)
    sweep = comparison.calibrators["EM routing, amortized"].pareto(answers, refit=True, cost_weights=weights)
    by_weight = sorted(sweep.points, key=lambda point: point.params["cost_weight"])
    print("\nlambda | test accuracy | relative cost | exit rates   (threshold 0.5, routers trained anew for each)")
    for point in by_weight:
        rates = " ".join(f"{rate:.2f}" for rate in point.exit_rates)
        print(f"{point.params['cost_weight']:6.2f} | {point.accuracy:13.4f} | {point.cost:13.3f} | {rates}")

    figure = pyplot.figure(figsize=(19, 7), layout="constrained")
    axes = figure.subplots(1, 3)
    ComparisonDisplay.from_comparison(comparison).plot(axes[0])
    axes[0].set_title("curves and simple rules (test)")
    SweepDisplay.from_frontier(sweep, "cost_weight", exit_names=model.exit_names).plot(axes[1])
    axes[1].set(xlabel="cost weight (nats) of EM routing, threshold 0.5")
    BarsDisplay.from_comparison(comparison, budget=BUDGET).plot(axes[2])
    figure.savefig(args.out, dpi=110)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
