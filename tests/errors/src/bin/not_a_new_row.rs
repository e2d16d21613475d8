//~ error[E0277]: `User` cannot be added to a session on
//~ `#[entity(new = New..)]` beside `#[derive(Entity)]` makes such a struct
use errors::{DB, Db, User};

fn main() {
    let session: Db = DB.session().unwrap();
    let _ = session.add(User { id: 1, name: String::new() });
}
