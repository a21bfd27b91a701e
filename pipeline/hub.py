"""Upload a folder to the Hugging Face hub. Who may write there is huggingface_hub's affair: no token is read here."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pipeline.errors import ConfigError, PipelineError, StorageError

_REFUSED, _ABSENT = (401, 403), 404


def push_folder(folder: Path, repo: str, private: bool, keep: str) -> str:
    """Upload a model's folder to `repo`, which is created if it isn't there; returns the page's address.

    Args:
        repo: OWNER/NAME.
        private: of a repository that is created. One that is there must be private already.
        keep: a file that stays as it is, where the repository has it.

    Raises:
        ConfigError: no token, one that may not write there, or a repository that is public.
        StorageError: the hub can't be reached or fails. `folder` stays in each case.
    """
    remedy = f"{folder} stays: upload it by `hf upload {repo} {folder}`"
    try:
        api = HfApi(library_name="mrmae")
        url = api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the owner has it
        if private and not api.repo_info(repo).private:
            raise ConfigError(f"{repo} is public already: choose another name, or private=false; {remedy}")
        kept = [keep] if api.file_exists(repo, keep) else []
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="mrmae export", ignore_patterns=kept)
    except PipelineError:
        raise
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise ConfigError(f"push={repo}: {_first_line(error)}; {remedy}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in _REFUSED:
            raise ConfigError(
                f"push={repo}: the hub refuses it ({status}): log in by `hf auth login` with a token that may write "
                f"there; {remedy}"
            ) from error
        if status == _ABSENT:
            raise ConfigError(f"push={repo}: the hub knows no such owner or repository; {remedy}") from error
        raise StorageError(f"push={repo}: the hub fails ({status}); {remedy}, or run again later") from error
    except Exception as error:  # each transport has errors of its own
        raise StorageError(
            f"push={repo}: the hub can't be reached ({type(error).__name__}); {remedy} when it can"
        ) from error
    return str(url)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
