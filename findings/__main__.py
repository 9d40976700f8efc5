"""All findings, one after the other: `python -m findings`, or `make findings`."""

import time

from findings.readme import ALL, README, render


def main() -> None:
    start = time.monotonic()
    for number, finding in enumerate(ALL, start=1):
        minutes = (time.monotonic() - start) / 60
        print(f"\n=== finding {number} of {len(ALL)}, after {minutes:.0f} min", flush=True)
        finding.run()
    README.write_text(render())
    print(f"\nAll of them in findings/README.md, after {(time.monotonic() - start) / 60:.0f} min")


if __name__ == "__main__":
    main()
