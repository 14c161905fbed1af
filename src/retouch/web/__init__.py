"""The page of ``retouch web``: for a person who would rather look than type.

It has no logic of its own. The page (``page/``, plain HTML, CSS and JavaScript) asks the JSON API under ``/api``; the
API calls what the command line calls:

    serve       the application, its routes and the process
    _workbench  the model at hand, and what is done with it
    _slims      saved slim models, and what they answer
    _bundles    saved recommenders, and what they recommend
    _adapters   adapters, and where they contradict each other
    _job        one piece of work at a time: in a thread, with progress and a way to stop it
    _folder     the one folder that is read and written
    _guard      who is let in
    _wire       what is asked and answered

The modules need the extra ``serve``.
"""

__all__: list[str] = []
