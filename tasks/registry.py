"""The model registry: every M_t a version, and the alias `champion` on the last one that passed its gates."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from srlm_core import store

CHAMPION = "champion"
CROWNED = "srlm.crowned"
"""Tag of a version that was champion once: an older campaign that is run again takes the alias from nobody."""


class Registry:
    """One registered model. What is there already is found and not made again."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    @cached_property
    def _model(self) -> str:
        """Name the registered model, once it is there."""
        if not self._client.search_registered_models(f"name = '{self._name}'"):
            try:
                self._client.create_registered_model(self._name)
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":  # another campaign was quicker
                    raise
        return self._name

    def version(self, model_id: str, run_id: str, tags: Mapping[str, str]) -> Any:
        """Return the version of a logged model; `tags` tell it from all others."""
        ours = store.digest(sorted(tags.items()))
        wanted = f"name = '{self._model}' AND tags.`srlm.version` = '{ours}'"
        if found := self._client.search_model_versions(wanted):
            return found[0]
        # not models:/ID: without a server, MLflow looks that up where no client of ours points it
        source = self._client.get_logged_model(model_id).artifact_location
        tags = {**tags, "srlm.version": ours}
        return self._client.create_model_version(self._name, source, run_id, tags, model_id=model_id)

    def crown(self, version: Any) -> None:
        """Move the alias to a version, once: it stays where somebody else put it later."""
        if CROWNED not in version.tags:
            self._client.set_registered_model_alias(self._name, CHAMPION, version.version)
            self._client.set_model_version_tag(self._name, version.version, CROWNED, "true")
