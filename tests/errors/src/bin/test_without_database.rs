//~ the database object comes first: `#[diesel_session::test(DB, ..)]`
//~ #[diesel_session::test(max_size = 2)]
use errors as _;

#[diesel_session::test(max_size = 2)]
fn reads() {}

fn main() {}
