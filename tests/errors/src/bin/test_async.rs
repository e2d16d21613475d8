//~ error: a test with a session is synchronous: drop `async`
//~ async fn reads()
use errors::DB;

#[diesel_session::test(DB)]
async fn reads() {}

fn main() {}
