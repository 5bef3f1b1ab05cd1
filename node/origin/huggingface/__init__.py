"""hf://: repositories of the Hugging Face Hub, read only.

store         the files of a repository as an object store; reads them by `node.origin.http`
file_system   the same files through huggingface_hub's file system, in blocking calls
errors        huggingface_hub's exceptions, as the errors of origins
"""
