"""Who `user` means is read from the image, which may lie: nothing of the host's is followed, no id leaves the range."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diyc.errors import ImageError
from diyc.images.users import MAX_FILE, Account, resolve_user

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/usr/sbin:/usr/sbin/nologin
app:x:1000:1001:An App:/home/app:/bin/sh
7:x:70:71:a name of digits:/seven:/bin/sh
homeless:x:5:5::relative:/bin/sh
"""
GROUP = """root:x:0:
daemon:x:1:
adm:x:4:root,app
staff:x:50:app
apps:x:1001:app
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make(tmp_path / "image", PASSWD, GROUP)


def make(root: Path, passwd: str | bytes | None, group: str | bytes | None) -> Path:
    (root / "etc").mkdir(parents=True)
    for name, text in (("passwd", passwd), ("group", group)):
        if text is not None:
            (root / "etc" / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


FOUND = {
    "root": Account(0, 0, (4,), "/root"),
    "app": Account(1000, 1001, (4, 50), "/home/app"),
    "1000": Account(1000, 1001, (4, 50), "/home/app"),
    "app:staff": Account(1000, 50, (4, 1001), "/home/app"),
    "app:9": Account(1000, 9, (4, 50, 1001), "/home/app"),
    "0:0": Account(0, 0, (4,), "/root"),
    "4242": Account(4242, 0, (), "/"),
    "4242:17": Account(4242, 17, (), "/"),
    "4242:adm": Account(4242, 4, (), "/"),
    "homeless": Account(5, 5, (), "/"),
    "65535": Account(65535, 0, (), "/"),
}


@pytest.mark.parametrize("user", FOUND)
def test_a_user_is_found_with_its_groups_and_home(user: str, image: Path) -> None:
    found = resolve_user(str(image), user)
    expected = FOUND[user]
    assert (found.uid, found.gid, found.home) == (expected.uid, expected.gid, expected.home)
    assert set(found.groups) == set(expected.groups)


def test_an_unknown_name_is_refused_with_the_names_there_are(image: Path) -> None:
    with pytest.raises(ImageError, match=r'user "nobody" is not in the image.* \(known: root, daemon, app, .*number'):
        resolve_user(str(image), "nobody")


def test_an_unknown_group_is_refused(image: Path) -> None:
    with pytest.raises(ImageError, match='group "wheel" is not in the image'):
        resolve_user(str(image), "app:wheel")


def test_an_image_without_a_passwd_file_knows_numbers_only(tmp_path: Path) -> None:
    root = make(tmp_path / "image", None, None)
    assert resolve_user(str(root), "0") == resolve_user(str(root), "root") == Account(0, 0, (), "/")
    with pytest.raises(ImageError, match="known: none"):
        resolve_user(str(root), "app")


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"{tmp_path}/nowhere"):
        resolve_user(str(tmp_path / "nowhere"), "0")


@pytest.mark.parametrize("user", ["65536", "4294967295", "4294967296", "0:65536", "99999999999999999999"])
def test_an_id_beyond_the_container_is_refused(user: str, image: Path) -> None:
    with pytest.raises(ImageError, match="above 65535"):
        resolve_user(str(image), user)


@pytest.mark.parametrize("uid, gid", [("65536", "0"), ("4294967296", "0"), ("0", "70000")])
def test_an_image_cannot_name_an_id_beyond_the_container(uid: str, gid: str, tmp_path: Path) -> None:
    root = make(tmp_path / "image", f"bad:x:{uid}:{gid}::/:/bin/sh\n", "")
    with pytest.raises(ImageError, match="above 65535"):
        resolve_user(str(root), "bad")


def test_a_group_of_thousands_of_digits_is_no_group(tmp_path: Path) -> None:
    root = make(tmp_path / "image", PASSWD, f"huge:x:{'9' * 5000}:app\nextra:x:9:app\n")
    assert resolve_user(str(root), "app").groups == (9,)


LYING = {
    "a negative id": "bad:x:-1:0::/:/bin/sh\n",
    "digits of another script": "bad:x:\u0661:0::/:/bin/sh\n",
    "a missing field": "bad:x:0:0:/:/bin/sh\n",
    "no id": "bad:x::0::/:/bin/sh\n",
    "an id of thousands of digits": f"bad:x:{'9' * 5000}:0::/:/bin/sh\n",
}


@pytest.mark.parametrize("case", LYING)
def test_a_broken_line_names_nobody(case: str, tmp_path: Path) -> None:
    root = make(tmp_path / "image", LYING[case], "")
    with pytest.raises(ImageError, match='"bad" is not in the image'):
        resolve_user(str(root), "bad")


@pytest.mark.parametrize("target", ["etc", "etc/passwd"])
def test_a_link_out_of_the_image_is_not_followed(target: str, tmp_path: Path) -> None:
    root = tmp_path / "image"
    root.mkdir()
    make(tmp_path / "host", "secret:x:7:7::/:/bin/sh\n", "")
    if target == "etc":
        (root / "etc").symlink_to(tmp_path / "host/etc")
    else:
        (root / "etc").mkdir()
        (root / "etc/passwd").symlink_to(tmp_path / "host/etc/passwd")
    with pytest.raises(ImageError, match="known: none"):
        resolve_user(str(root), "secret")


def test_a_fifo_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    root = make(tmp_path / "image", None, "")
    os.mkfifo(root / "etc/passwd")
    assert resolve_user(str(root), "3") == Account(3, 0, (), "/")


def test_only_so_much_of_a_huge_file_is_read(tmp_path: Path) -> None:
    root = make(tmp_path / "image", PASSWD, None)
    with open(root / "etc/group", "wb") as file:
        file.truncate(1 << 30)  # sparse
    with open(root / "etc/passwd", "r+b") as file:
        file.seek(MAX_FILE)
        file.write(b"\nlate:x:8:8::/:/bin/sh\n")
    assert resolve_user(str(root), "app").uid == 1000
    with pytest.raises(ImageError, match='"late" is not in the image'):
        resolve_user(str(root), "late")


def test_a_user_in_a_thousand_groups_gets_no_more_than_the_first_64(tmp_path: Path) -> None:
    group = "".join(f"g{n}:x:{n}:app\n" for n in range(2000, 3000))
    root = make(tmp_path / "image", PASSWD, group)
    assert resolve_user(str(root), "app").groups == tuple(range(2000, 2064))


@given(passwd=st.binary(max_size=200), group=st.binary(max_size=200), user=st.sampled_from(["0", "root", "5:x"]))
def test_whatever_the_image_holds_the_answer_is_in_range_or_a_refusal(
    passwd: bytes, group: bytes, user: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = make(tmp_path_factory.mktemp("any") / "image", passwd, group)
    try:
        found = resolve_user(str(root), user)
    except ImageError:
        return
    assert all(0 <= number <= 65535 for number in (found.uid, found.gid, *found.groups))
    assert found.home.startswith("/")
