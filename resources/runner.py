"""Runs steps against the store: what is stored is found by its fingerprint, what is missing is made by its worker."""

from collections.abc import Iterable, Iterator, Mapping

from compression_dags.heartbeat import tracked
from compression_dags.job import Job
from compression_dags.provenance.artifacts import Artifact, request_of
from compression_dags.resources.accelerator import Accelerator
from compression_dags.resources.artifact_store import ArtifactStore, Produced, Workplace
from compression_dags.step import BASE, Step


def produce(
    store: ArtifactStore, accelerator: Accelerator, step: Step, inputs: Mapping[str, Artifact], run_id: str = ""
) -> Produced:
    """The artifact of a step, stored already or made now.

    Args:
        inputs: role → artifact, of every role that the step reads.

    Raises:
        InputError: the step refuses its inputs or options, or the home is full.
        IntegrityError: something computed cannot be used.
    """
    request = request_of(step, {role: artifact.digest for role, artifact in inputs.items()}, accelerator.numeric)

    def build(work: Workplace) -> dict:
        return step.run(Job(step, inputs, work.out, accelerator.lease, work.resume(), tracked))

    return store.produce(request, build, run_id)


def stored_steps(
    store: ArtifactStore, steps: Iterable[Step], base: Artifact | None, numeric: Mapping[str, str]
) -> Iterator[tuple[Step, str, Artifact | None]]:
    """Every step with a fingerprint and its artifact, None where that is not stored; nothing is computed.

    Manifests alone are read: whether the bytes are whole is checked when they are used. A step that hangs on one which
    is not stored has a fingerprint of stand-ins for the digests that nobody knows yet: equal for equal steps.

    Args:
        base: the imported base model; None if it is not stored.
    """
    digests = {BASE: base.digest if base else BASE}
    for step in steps:
        request = request_of(step, {role: digests[source] for role, source in step.sources.items()}, numeric)
        artifact = store.manifest_of(request.kind, request.fingerprint)
        digests[step.name] = artifact.digest if artifact else request.fingerprint
        yield step, request.fingerprint, artifact
