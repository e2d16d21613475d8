//~ error: `max_sise` is not known here; there is `isolation`, `max_size`, `fixtures(..)`, `fixture`, `config`, `warn_repeats`, `keep` and `template`
//~ #[diesel_session::test(DB, max_sise = 2)]
use errors::DB;

#[diesel_session::test(DB, max_sise = 2)]
fn reads() {}

fn main() {}
