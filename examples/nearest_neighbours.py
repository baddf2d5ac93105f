"""The most similar ECGs of a collection.

    ecgmoe embed my_ecgs/ --out emb.parquet
    python examples/nearest_neighbours.py emb.parquet my_ecgs/record_17.hea --k 5

Similar is what points the same way from the middle of the collection: the cosine of centred embeddings.
"""

import argparse

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sklearn.neighbors import NearestNeighbors

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", help="a file of `ecgmoe embed`")
    parser.add_argument("query", help="path or record name of one of its rows")
    parser.add_argument("--k", type=int, default=5, help="how many to show (default: 5)")
    args = parser.parse_args()

    table = pq.read_table(args.embeddings)
    table = table.filter(pc.equal(table["status"], "ok"))
    vectors = np.stack(table["embedding"].to_pylist()).astype(np.float32)
    paths, records = table["path"].to_pylist(), table["record"].to_pylist()
    if args.query not in paths + records:
        parser.error(f"{args.query} is not among the {len(paths)} embedded records")
    row = paths.index(args.query) if args.query in paths else records.index(args.query)

    centred = vectors - vectors.mean(axis=0)
    index = NearestNeighbors(n_neighbors=min(args.k + 1, len(paths)), metric="cosine").fit(centred)
    distances, found = index.kneighbors(centred[row : row + 1])
    for distance, other in zip(distances[0], found[0], strict=True):
        if other != row:
            print(f"{1 - distance:6.3f}  {paths[other]}")
