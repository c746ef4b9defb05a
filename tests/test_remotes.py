"""docs/SHARING.md with real servers and fresh clones: what comes back, and what failures say.

Each message that is looked for here is looked for in docs/SHARING.md too.
"""

import copy
import shutil
import stat

import pytest
import yaml

from tests.kill import cloned, commit, copied, dvc, git, outputs, run
from tests.project import ROOT
from tests.servers import HOST, SERVERS, WRITABLE, http, self_signed_certificate
from tests.test_verify import flip

SHARING = (ROOT / "docs" / "SHARING.md").read_text()


@pytest.fixture(scope="session")
def trained(baseline, made_once):
    """A project that is trained, committed, and pushed to the folder `remote` beside it."""

    def make(folder):
        project = copied(baseline, folder / "project")
        dvc(project, "remote", "add", "--default", "team", str(folder / "remote"))
        dvc(project, "push", "--run-cache")
        commit(project)
        return project

    return made_once("remotes", make)


@pytest.fixture
def clone(trained, tmp_path):
    """A fresh clone of it, with a remote of its own that tests may damage."""
    clone = cloned(trained, tmp_path / "clone")
    shutil.copytree(trained.folder.with_name("remote"), tmp_path / "remote")
    configure(clone, url=tmp_path / "remote")
    return clone


def configure(project, **options):
    """Settings of the remote `team` for this clone alone, as `dvc remote modify --local` writes."""
    lines = ["['remote \"team\"']", *(f"    {name} = {value}" for name, value in options.items())]
    (project.folder / ".dvc" / "config.local").write_text("\n".join(lines) + "\n")


def says(output, *messages):
    """Assert that dvc said so and that the documentation quotes it."""
    for message in messages:
        assert message in output
        assert message in SHARING, message


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*")
            if f.is_file()}  # fmt: skip


def runs(project):
    return contents(project.folder / ".dvc" / "cache" / "runs")


def recorded(project, out):
    """Where a cache or a remote keeps an output, a folder's list of files: from dvc.lock."""
    stages = yaml.safe_load(project.read("dvc.lock"))["stages"].values()
    (md5,) = {o["md5"] for stage in stages for o in stage["outs"] if o["path"] == out}
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def weights(project, storage):
    """The file of the model's weights in a cache or a remote."""
    listed = yaml.safe_load((storage / recorded(project, "models/model")).read_text())
    (md5,) = {file["md5"] for file in listed if file["relpath"] == "model.safetensors"}
    return storage / f"files/md5/{md5[:2]}/{md5[2:]}"


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.soak if k == "webdav" else ()) for k in WRITABLE],
)
def test_what_is_pushed_comes_back_in_a_fresh_clone(kind, trained, tmp_path):
    project = copied(trained, tmp_path / "project")
    with WRITABLE[kind](tmp_path / kind) as remote:
        dvc(project, "remote", "add", "--force", "--default", "team", remote.url)
        for name, value in remote.options.items():
            dvc(project, "remote", "modify", "team", name, value)
        for name, value in remote.secrets.items():
            dvc(project, "remote", "modify", "--local", "team", name, value)
        commit(project)
        dvc(project, "push", "--run-cache")
        clone = cloned(project, tmp_path / "clone")
        configure(clone, **remote.secrets)
        dvc(clone, "pull", "--run-cache")
        assert git(clone, "status", "--porcelain") == ""
        assert "up to date" in dvc(clone, "status")
        assert "are in sync" in dvc(clone, "status", "--cloud")
    assert outputs(clone) == outputs(project)
    assert runs(clone) == runs(project)
    assert ".dvc/config.local" not in git(project, "ls-files")


@pytest.mark.parametrize("scheme", [pytest.param("http", marks=pytest.mark.soak), "https"])
def test_the_public_reads_by_http_what_a_maintainer_pushes_to_a_folder(scheme, trained, tmp_path):
    project = copied(trained, tmp_path / "project")
    remote = trained.folder.with_name("remote")
    certificate = self_signed_certificate(tmp_path / "key.pem") if scheme == "https" else None
    with http(remote, certificate) as public:
        dvc(project, "remote", "modify", "team", "url", public.url)
        dvc(project, "remote", "modify", "--local", "team", "url", str(remote))
        commit(project)
        assert "are in sync" in dvc(project, "status", "--cloud")
        clone = cloned(project, tmp_path / "clone")
        if certificate:
            says(dvc(clone, "pull", code=1), "Missing cache files", "Checkout failed")
            trust = str(certificate.with_suffix(".crt"))
            dvc(clone, "remote", "modify", "--local", "team", "ssl_verify", trust)
        dvc(clone, "pull", "--run-cache")
        assert "are in sync" in dvc(clone, "status", "--cloud")
    assert outputs(clone) == outputs(project)
    assert runs(project)
    assert not runs(clone)  # HTTP cannot list files, and dvc does not say so


def test_the_model_alone_can_be_had_with_and_without_a_clone(trained, tmp_path):
    clone = cloned(trained, tmp_path / "clone")
    dvc(clone, "pull", "models/model")
    model = contents(trained.folder / "models" / "model")
    assert contents(clone.folder / "models" / "model") == model
    assert not [path for path in ("data/tokens", "models/checkpoints", "metrics/eval.json")
                if (clone.folder / path).exists()]  # fmt: skip

    user = copy.deepcopy(trained)
    user.folder = tmp_path / "user"
    user.folder.mkdir()
    source = str(clone.folder)
    dvc(user, "get", source, "models/model", "--out", "got")
    says(dvc(user, "artifacts", "get", source, "model", code=1), "Unable to find artifact 'model'")
    git(clone, "tag", "-a", "model@v1.0.0", "-m", "first")
    dvc(user, "artifacts", "get", source, "model", "--rev", "v1.0.0", "--out", "named")
    git(user, "init", "-q")
    dvc(user, "init", "-q")
    dvc(user, "import", source, "models/model", "--out", "imported")
    for folder in ("got", "named", "imported"):
        assert contents(user.folder / folder) == model

    for name, value in (("user.name", "test"), ("user.email", "test@example.org")):
        git(user, "config", name, value)
    with open(user.folder / ".gitignore", "a") as ignored:
        ignored.write("/got\n/named\n")
    commit(user)
    colleague = cloned(user, tmp_path / "colleague")
    dvc(colleague, "pull")  # from the first project's remote: this one has none
    assert contents(colleague.folder / "imported") == model


def test_repro_with_pull_in_a_fresh_clone_trains_nothing(trained, tmp_path):
    clone = cloned(trained, tmp_path / "clone")
    assert "Running stage" not in dvc(clone, "repro", "--pull")
    assert git(clone, "status", "--porcelain") == ""
    assert outputs(clone) == outputs(trained)


def test_an_experiments_settings_are_restored_elsewhere_once_it_was_pushed(trained, tmp_path):
    project, remote = copied(trained, tmp_path / "project"), tmp_path / "remote"
    configure(project, url=remote)
    dvc(project, "exp", "run", "--name", "short", "-S", "evaluate.max_new_tokens=3")
    samples, lock = recorded(project, "metrics/samples.md"), project.read("dvc.lock")
    git(project, "checkout", "-q", ".")
    git(project, "clone", "-q", "--bare", ".", str(tmp_path / "origin"))
    git(project, "remote", "add", "origin", str(tmp_path / "origin"))
    dvc(project, "push", "--run-cache")
    assert (remote / recorded(project, "metrics/samples.md")).exists()
    assert not (remote / samples).exists()  # that it ran, not what it made
    dvc(project, "exp", "push", "origin", "short")
    assert (remote / samples).exists()

    project.folder = tmp_path / "origin"
    clone = cloned(project, tmp_path / "clone")
    configure(clone, url=remote)
    clone.set("evaluate.max_new_tokens", 3)
    assert "Running stage" not in dvc(clone, "repro", "--pull")
    assert clone.read("dvc.lock") == lock
    git(clone, "checkout", "-q", ".")
    dvc(clone, "exp", "pull", "origin", "short")
    dvc(clone, "exp", "apply", "short")
    assert clone.read("dvc.lock") == lock
    assert "up to date" in dvc(clone, "status")


def test_two_clones_share_one_cache_and_the_second_trains_nothing(trained, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2770)
    first, second = cloned(trained, tmp_path / "first"), cloned(trained, tmp_path / "second")
    for clone in (first, second):
        dvc(clone, "cache", "dir", "--local", str(cache))
        dvc(clone, "config", "--local", "cache.shared", "group")
    dvc(first, "pull", "--run-cache")
    (second.folder / "dvc.lock").unlink()  # as after other settings and back: the run cache knows
    assert "Running stage" not in dvc(second, "repro")
    assert git(second, "status", "--porcelain") == ""
    assert outputs(first) == outputs(second) == outputs(trained)
    assert not (second.folder / ".dvc" / "cache" / "files").exists()

    kept = weights(trained, cache)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o444
    assert kept.parent.stat().st_mode & stat.S_IWGRP
    assert kept.parent.stat().st_mode & stat.S_ISGID
    name = "models/model/model.safetensors"
    before = kept.read_bytes()
    (first.folder / name).write_bytes(b"a stray write")
    assert kept.read_bytes() == second.read(name) == before


def test_without_a_remote_push_and_pull_say_so(trained, tmp_path):
    clone = cloned(trained, tmp_path / "clone")
    dvc(clone, "config", "--unset", "core.remote")
    says(dvc(clone, "pull", code=1), "No remote provided and no default remote set")
    says(dvc(clone, "push", code=1), "config file error: no remote specified")


@pytest.mark.parametrize(
    ("kind", "message", "code"),
    [("ssh", "Permission denied for user", 1), ("webdav", "received 401 (Not Authorized)", 255)],
)
def test_refused_credentials_are_named(kind, message, code, clone, tmp_path):
    with WRITABLE[kind](tmp_path / kind) as remote:
        configure(clone, url=remote.url, **(remote.secrets | remote.refused))
        says(dvc(clone, "pull", code=code), message)


@pytest.mark.parametrize(
    ("url", "message", "code"),
    [
        ("/nowhere/remote", "Missing cache files", 1),
        (f"ssh://{HOST}:PORT/remote", "failed to connect to ssh", 1),
        (f"webdav://{HOST}:PORT/team", "Connection refused", 255),
        (f"http://{HOST}:PORT", "Missing cache files", 1),
    ],
    ids=["folder", "ssh", "webdav", "http"],
)
def test_a_remote_that_is_not_there_is_named_or_looks_empty(url, message, code, clone, port):
    configure(clone, url=url.replace("PORT", str(port)))
    says(dvc(clone, "pull", code=code), message)


@pytest.mark.soak
def test_an_s3_server_that_is_not_there_is_named_where_attempts_are_limited(clone, port):
    configure(clone, url="s3://team/dvc", endpointurl=f"http://{HOST}:{port}",
              access_key_id="ann", secret_access_key="any", connect_timeout=2)  # fmt: skip
    done = run(clone, "env", "AWS_MAX_ATTEMPTS=1", "dvc", "pull")
    assert done.returncode == 1
    says(done.stdout, "Could not connect to the endpoint URL")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "found", "lost", "message"),
    [
        ("s3", "team", "nobody", "The specified bucket does not exist"),
        ("webdav", "/team", "/nobody", "could not be found in the server"),
    ],
)
def test_a_bucket_or_collection_must_exist(kind, found, lost, message, trained, tmp_path):
    project = copied(trained, tmp_path / "project")
    with WRITABLE[kind](tmp_path / kind) as remote:
        url = remote.url.replace(found, lost)
        configure(project, url=url, **remote.options, **remote.secrets)
        says(dvc(project, "push", code=255), message)


def test_an_object_lost_from_the_remote_is_pushed_again_only_with_its_list(trained, clone):
    remote = clone.folder.with_name("remote")
    lost = weights(trained, remote)
    lost.unlink()
    said = dvc(clone, "pull", code=1)
    says(said, "failed to transfer")
    assert lost.parent.name + lost.name in said
    owner = copied(trained, clone.folder.with_name("owner"))
    configure(owner, url=remote)
    says(dvc(owner, "push"), "Everything is up to date")  # it is not: dvc looks at the list alone
    assert not lost.exists()
    (remote / recorded(trained, "models/model")).unlink()
    dvc(owner, "push")
    dvc(clone, "pull")
    assert outputs(clone) == outputs(trained)


OTHERS = [pytest.param(kind, marks=pytest.mark.soak) for kind in ("ssh", "webdav", "http")]


@pytest.mark.parametrize("kind", ["folder", *OTHERS])
def test_damage_in_a_remote_is_found_by_verify_and_by_dvc_where_asked(kind, trained, tmp_path):
    whole = trained.folder.with_name("remote")
    trusting, careful = (cloned(trained, tmp_path / name) for name in ("trusting", "careful"))
    with SERVERS[kind](tmp_path / kind) as remote:
        shutil.copytree(whole, remote.storage, dirs_exist_ok=True)
        damaged = weights(trained, remote.storage)
        flip(damaged)
        configure(trusting, url=remote.url, **remote.secrets)
        dvc(trusting, "pull")
        assert "up to date" in dvc(trusting, "status")
        done = run(trusting, "python", "-m", "tools.verify")
        assert done.returncode == 2
        cached = weights(trained, trusting.folder / ".dvc" / "cache")
        assert f"fault: {cached}: md5" in done.stdout

        configure(careful, url=remote.url, **remote.secrets, verify="true")
        says(dvc(careful, "pull", code=1), "Checkout failed")
        assert not (careful.folder / "models" / "model").exists()

        damaged.unlink()  # now as documented
        shutil.copy(weights(trained, whole), damaged)
        cached.unlink()
        shutil.rmtree(trusting.folder / "models" / "model")
        for clone in (trusting, careful):
            dvc(clone, "pull")
            assert outputs(clone) == outputs(trained)


def test_after_git_checkout_alone_the_files_are_those_of_the_other_commit(trained, tmp_path):
    project = copied(trained, tmp_path / "project")
    project.set("evaluate.max_new_tokens", 3)
    dvc(project, "repro", "evaluate")
    commit(project)
    git(project, "checkout", "-q", "HEAD~1")
    says(dvc(project, "status"), "changed outs", "modified:")
    assert outputs(project) != outputs(trained)
    dvc(project, "checkout")
    assert "up to date" in dvc(project, "status")
    assert outputs(project) == outputs(trained)
