//~ error[E0277]: the trait bound `i32: From<&str>` is not satisfied
use errors::{DB, Db, User};

fn main() {
    let session: Db = DB.session().unwrap();
    let _ = session.get::<User>("7");
}
