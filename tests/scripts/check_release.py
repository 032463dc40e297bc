"""What a release holds: the sdist every file of the repository but CI's, the wheel the package: check_release.py DIST.

Run by `make dist` in a clone.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

OF_GIT_ALONE = (".ci/", ".gitignore")


def main() -> None:
    dist = Path(sys.argv[1])
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {file for file in listed if not file.startswith(OF_GIT_ALONE)}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    package = {file for file in wanted if file.startswith("cmp_trainer/")}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    problems = {
        "not in the sdist": wanted - held,
        "not in the wheel": package - in_wheel,
        "in the wheel, but no file of the package": in_wheel - package,
    }
    found = [f"{problem}: {', '.join(sorted(files))}" for problem, files in problems.items() if files]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
