"""The demo, from made-up records to a table, a picture and a model card; see hf_dp/demo/run.py."""

import logging

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # peft loads it, and it complains of kernels nobody needs here

from hf_dp.demo.run import main

if __name__ == "__main__":
    main()
