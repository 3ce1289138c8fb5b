"""`vmonarch compare`: one clip made dense and with presets, or two clips that exist, held against each other.

`runs` makes the clips with one loaded model, `existing` reads them from files; both fill `results`. `figures` measures
(the only module here besides `runs` that imports torch), `pictures` draws and `page` writes the report.
"""
