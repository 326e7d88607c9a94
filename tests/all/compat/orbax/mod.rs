mod deferred;
mod handlers;
mod managing;
mod policies;
